"""Adapter folders before any model is loaded: which adapters a path names, and what each says of base and task.

kitout's own folders, Hugging Face PEFT's, and run folders of `kitout train`, which hold one adapter or several. It
knows files, and neither models nor tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

from kitout.errors import ConfigError, Errors, FileError, KitoutError
from kitout.files.adapter_json import RECORD, AdapterJson, read_adapter_json
from kitout.files.part_folders import PARTS
from kitout.files.system_errors import as_path
from kitout.files.usage_record import UsageRecord
from kitout.fuse.result import common_usage
from kitout.train.objectives.tasks import REWARD, USES
from kitout.train.run_folder import RUN_FILE

PEFT_CONFIG = "adapter_config.json"
PEFT_TASKS = {
    "CAUSAL_LM": "causal_lm", "SEQ_2_SEQ_LM": "seq2seq_lm", "SEQ_CLS": "classification",
    "TOKEN_CLS": "token_classification",
}  # fmt: skip
MAX_PEFT_CONFIG_BYTES = 2**20
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_OWN = re.compile(r"lora_|ia3_|prompt_embeddings")  # tensors of PEFT's methods


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder, before any model is loaded."""

    folder: Path
    """kitout's own or PEFT's."""
    name: str
    """Under which it is loaded."""
    usage: UsageRecord | None = None
    """What the folder says of its use."""
    base: str | None = None
    """The name of its base, where no usage says it."""
    task: str | None = None
    """Its task, where no usage says it."""
    is_peft: bool = False
    """Hugging Face PEFT's folder."""
    num_labels: int | None = None
    """Outputs of the head that it holds, where no usage names them."""


def read_folders(folders: Sequence[str | PathLike[str]], verify: bool) -> list[SavedAdapter]:
    """Every adapter of these folders. KitoutError names all that cannot be read."""
    errors = Errors(FileError, "adapters")
    saved: list[SavedAdapter] = []
    for folder in folders:
        try:
            for path in adapters_in(as_path(folder)):
                saved.append(_read_folder(path, [one.name for one in saved], verify))
        except KitoutError as error:
            errors.add(str(error))
    errors.raise_if_any()
    return saved


def one_adapter(folder: str | PathLike[str], verify: bool = True) -> SavedAdapter:
    """The only adapter that a path names. FileError where there are several."""
    saved = read_folders([folder], verify)
    if len(saved) > 1:
        names = ", ".join(one.name for one in saved)
        raise FileError(f"{folder} holds the adapters {names}: name one, {saved[0].folder}")
    return saved[0]


def check_writes(saved: Sequence[SavedAdapter], task: str | None = None) -> None:
    """ConfigError where an adapter is no language model's. task: of those that do not say it."""
    for one in saved:
        task = (one.task if one.usage is None else one.usage.task) or task
        if task in USES and not USES[task].generates_text:
            text = "image.png" if USES[task].reads_images else "answers.jsonl" if task == REWARD else "'a text'"
            raise ConfigError(f"{one.name} is for {task} and writes no text: kitout predict {one.folder} {text}")


def adapters_in(folder: Path) -> list[Path]:
    """The adapter folders that a path names: itself, or those of a run folder of `kitout train`."""
    if _is_adapter(folder):
        return [folder]
    inner = folder / "adapter"
    if _is_adapter(inner):
        return [inner]
    for container in (inner, folder):
        if container.is_dir() and (found := sorted(p for p in container.iterdir() if p.is_dir() and _is_adapter(p))):
            return found
    if (folder / RUN_FILE).is_file():
        raise FileError(f"{folder} is a run without an adapter: it is not finished; the same `kitout train` resumes it")
    there = (
        "it is a file" if folder.is_file() else "there is no such folder" if not folder.exists() else _listing(folder)
    )
    raise FileError(f"{folder} holds no adapter ({RECORD}, or {PEFT_CONFIG} of PEFT): {there}")


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return f"it holds {', '.join(names[:6])}" if names else "it is empty"


def _is_adapter(folder: Path) -> bool:
    return (folder / RECORD).is_file() or (folder / PEFT_CONFIG).is_file()


def _read_folder(folder: Path, taken: Sequence[str], verify: bool) -> SavedAdapter:
    if (folder / RECORD).is_file():
        record = read_adapter_json(folder / RECORD, verify)
        base = record.base_name or record.note.get("base")
        usage = record.usage or _usage_of_parts(folder, record, verify)
        return SavedAdapter(
            folder, free_name(record.name, folder, taken), usage, base if isinstance(base, str) else None
        )
    file = folder / PEFT_CONFIG
    if file.stat().st_size > MAX_PEFT_CONFIG_BYTES:
        raise FileError(f"{file} has {file.stat().st_size:,} bytes; a PEFT config has a few thousand")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        base, task = fields.get("base_model_name_or_path"), str(fields.get("task_type"))
    except (ValueError, RecursionError, AttributeError) as error:
        raise FileError(f"{file} is no PEFT config: {str(error)[:200]}") from None
    return SavedAdapter(
        folder, free_name(folder.name, folder, taken), None, base if isinstance(base, str) else None,
        PEFT_TASKS.get(task), True, _num_labels(folder / PEFT_TENSORS) if task.endswith("_CLS") else None,
    )  # fmt: skip


def _usage_of_parts(folder: Path, record: AdapterJson, verify: bool) -> UsageRecord | None:
    """What all parts of a composition say that says nothing itself; its parts lie in it, or beside it in another's."""
    root = folder / PARTS if (folder / PARTS).is_dir() else folder.parent
    files = [root / name / RECORD for name in record.parts or {}]
    if not files or not all(file.is_file() for file in files):
        return None  # said by whoever loads it
    usages = [(r := read_adapter_json(f, verify)).usage or _usage_of_parts(f.parent, r, verify) for f in files]
    common = common_usage([None if usage is None else usage.model_dump() for usage in usages])
    return None if common is None else UsageRecord.model_validate(common)


def _num_labels(file: Path) -> int | None:
    """Rows of the narrowest matrix that is no part of the method: the last one of the head."""
    try:
        with safe_open(file, "numpy") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return None  # said by whoever loads it
    heads = [s[0] for name, s in shapes.items() if len(s) == 2 and not PEFT_OWN.search(name)]
    return min(heads, default=None)


def free_name(name: str, folder: Path, taken: Sequence[str]) -> str:
    """The adapter's own name; with its run's name before it where another one has it."""
    if name not in taken:
        return name
    run = folder.resolve().parent.name
    candidates = (f"{run}-{name}", *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
    return next(each for each in candidates if each not in taken)
