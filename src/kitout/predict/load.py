"""`kitout.load`: adapter folders -> their base, found and loaded as it was in training -> a Predictor.

The base is what the caller gives, else the hub or built-in name that adapter.json holds, else the path in the run
folder's own run.yaml. Its fingerprint decides whether it is the right one, its tokenizer's digest whether texts are cut
as they were. No path of another machine is ever tried, and no code of a model's folder is run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from kitout.data.encode.template_date import fix_template_date
from kitout.data.encode.tokenizer_digest import template_digest, tokenizer_digest
from kitout.errors import ConfigError, FileError, suggest
from kitout.evaluate.ask.text_limit import max_tokens
from kitout.files.part_folders import are_same
from kitout.files.portable_name import HUB_NAME, portable_name
from kitout.files.usage_record import BaseRecord, TextRecord, UsageRecord
from kitout.format import short_repr
from kitout.kit import Kit, attach
from kitout.peft_folders import load_peft
from kitout.predict.predictor import Predictor
from kitout.predict.saved_adapters import SavedAdapter, free_name, read_folders
from kitout.train.config.error_messages import explain
from kitout.train.config.schema import ModelConfig
from kitout.train.config.yaml_file import read_yaml
from kitout.train.objectives.tasks import USES, Task
from kitout.train.run_folder import RUN_FILE
from kitout.train.setup import base_model, lengths
from kitout.train.setup.find_inputs import resolve_model


def load(
    *folders: str | PathLike[str],
    base: str | PathLike[str] | nn.Module | None = None,
    tokenizer: Any = None,
    task: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    verify: bool = True,
) -> Predictor:
    """Adapters on their base, ready to predict; the first one is active.

    folders: adapter folders (kitout's or PEFT's), or run folders of `kitout train`, all for one base; none: the base
    alone. base: a folder, a name, or a model; None: as the adapter says. tokenizer: for a base that is given as a model
    (or its image processor's folder). task: what an adapter made without one is for. device: auto, cpu or cuda. dtype:
    of the base, "auto" for the faster one here; None: as in training. verify: False compares no digests.
    Raises WrongBase, FileError or ConfigError, which say what to give instead.
    """
    saved = read_folders(folders, verify)
    task_name = _task_of(saved, task)
    if isinstance(base, nn.Module):
        requested = _model_config("model", None, device, dtype).dtype
        if requested not in ("auto", str(next(base.parameters()).dtype).removeprefix("torch.")):
            raise ConfigError(f"base is a model already, and not in {requested}: leave out dtype=, or convert it first")
        return _on_model(saved, base, tokenizer, task_name, verify)
    usage = next((one.usage for one in saved if one.usage is not None), None)
    name = find_base(saved, base)
    config = _model_config(name, usage, device, dtype)
    hf_config = base_model.load_config(config)
    used_task = USES[task_name or _default_task(hf_config)]
    own_tokenizer = None if used_task.reads_images else (tokenizer or base_model.load_tokenizer(config))
    pad_token_id = None if own_tokenizer is None else base_model.choose_pad_token(hf_config, own_tokenizer)
    labels = tuple(usage.labels) if usage is not None else tuple(hf_config.id2label.values())
    num_labels = next((one.num_labels for one in saved if one.num_labels is not None), None)
    if usage is None and num_labels is not None and num_labels != len(labels):
        labels = tuple(f"LABEL_{i}" for i in range(num_labels))  # as transformers calls labels without a name
    labels = () if used_task.generates_text else labels
    image_size = usage.images.size if usage is not None and usage.images is not None else None
    is_missing = used_task.needs_pad_id and hf_config.get_text_config().pad_token_id is None
    placement = base_model.choose_placement(config)
    loaded = base_model.load_model(config, used_task, placement, labels, pad_token_id if is_missing else None)
    kit = base_model.attach_for_training(loaded, config, used_task, placement, 0, image_size).kit
    predictor = _assemble(kit, saved, used_task, own_tokenizer, pad_token_id, config, verify)
    predictor.untrained_heads = loaded.new_heads
    return predictor


def _on_model(
    saved: Sequence[SavedAdapter], model: nn.Module, tokenizer: Any, task_name: str | None, verify: bool
) -> Predictor:
    """On a model, or a kit, that the caller has loaded."""
    kit = model if isinstance(model, Kit) else attach(model).eval()
    hf_config: Any = kit.config
    name = str(getattr(hf_config, "_name_or_path", "") or "")
    task = USES[task_name or _default_task(hf_config)]
    config = ModelConfig(name=name or "model")
    if not task.reads_images and tokenizer is None:
        if not name:
            raise ConfigError("base is a model that does not say where its tokenizer is: give tokenizer=...")
        tokenizer = base_model.load_tokenizer(config)
    if task.reads_images and isinstance(tokenizer, str | PathLike):
        config = ModelConfig(name=str(tokenizer))
    tokenizer = None if task.reads_images else tokenizer
    pad_token_id = None if tokenizer is None else base_model.choose_pad_token(hf_config, tokenizer)
    return _assemble(kit, saved, task, tokenizer, pad_token_id, config, verify)


def _assemble(
    kit: Kit, saved: Sequence[SavedAdapter], task: Task, tokenizer: Any, pad_token_id: int | None, config: ModelConfig,
    verify: bool,
) -> Predictor:  # fmt: skip
    """Loads the adapters and checks that texts are cut as they were in training."""
    chat_template = None if tokenizer is None else tokenizer.chat_template
    day = next((s.usage.text.template_date for s in saved if s.usage is not None and s.usage.text is not None), None)
    if tokenizer is not None and day is not None:
        fix_template_date(tokenizer, day)
    usages: dict[str, UsageRecord] = {}
    folders: dict[str, Path] = {}
    for one in saved:
        name = _load_one(kit, one, [*usages, *(each.name for each in saved)], verify)
        kit.use(name)
        folders[name] = one.folder
        usages[name] = one.usage or _made_up_usage(kit, task, tokenizer, config, name)
        if verify and tokenizer is not None and one.usage is not None and one.usage.text is not None:
            _check_tokenizer(one, one.usage.text, tokenizer, chat_template, config.name)
    kit.use(next(iter(usages), None))
    if not saved:
        usages[""] = _made_up_usage(kit, task, tokenizer, config, None)

    def pixels(usage: UsageRecord) -> Any:
        from kitout.predict.image_inputs import pixel_processor  # images need pillow

        return pixel_processor(resolve_model(config.name), usage.images)

    predictor = Predictor(kit, tokenizer, usages, pad_token_id, pixels if task.reads_images else None, chat_template)
    predictor.folders = folders
    return predictor


def _load_one(kit: Kit, one: SavedAdapter, taken: Sequence[str], verify: bool) -> str:
    """Loads an adapter. Its name: another one where a composition has brought a part of that name that is not it."""
    if one.name not in kit:
        if one.is_peft:
            load_peft(kit, one.folder, one.name)
        else:
            kit.load(one.folder, name=one.name, verify=verify)
        return one.name
    name = free_name(one.name, one.folder, [*taken, *kit.names])
    _load_one(kit, replace(one, name=name), taken, verify)
    if are_same(kit.state, name, one.name):
        kit.remove(name)
        return one.name
    return name


# ---- the task ------------------------------------------------------------------------------------------------------


def _task_of(saved: Sequence[SavedAdapter], task: str | None) -> str | None:
    """The one task of all adapters; None where nothing says it and the model does."""
    if task is not None and task not in USES:
        raise ConfigError(f"task={short_repr(task)}: {suggest(str(task), USES)}")
    stated = {one.name: one.usage.task if one.usage is not None else one.task for one in saved}
    unknown = sorted({name for name in stated.values() if name is not None and name not in USES})
    if unknown:
        raise FileError(f"the task {short_repr(unknown[0])} is not known to this kitout: install a newer one")
    names = {name for name in stated.values() if name is not None}
    if len(names | ({task} if task else set())) > 1:
        each = ", ".join(f"{name}: {own}" for name, own in stated.items())
        given = f"; task={task} was given" if task else ""
        raise ConfigError(f"adapters on one model have one task, found {each}{given}: load them apart")
    if not names and task is None and any(not one.is_peft for one in saved):
        raise ConfigError(
            f"{saved[0].folder} does not say what it is for (it was not made by `kitout train`): give task=, one of "
            f"{', '.join(USES)} (on the command line: --task TASK)"
        )
    return task or next(iter(names), None)


def _default_task(hf_config: Any) -> str:
    return "seq2seq_lm" if getattr(hf_config, "is_encoder_decoder", False) else "causal_lm"


# ---- the base --------------------------------------------------------------------------------------------------


def find_base(saved: Sequence[SavedAdapter], base: str | PathLike[str] | None) -> str:
    """What loads the base: as given, else as the first adapter says."""
    if base is not None:
        return str(base)
    if not saved:
        raise ConfigError("nothing to load: give adapter folders, or base=MODEL")
    first = saved[0]
    record = first.usage.base if first.usage is not None else None
    name = record.name if record is not None else first.base
    if record is not None and record.source != "folder":
        if not HUB_NAME.fullmatch(record.name):
            raise FileError(
                f"{first.folder}: its base is called {short_repr(record.name)}, which is no name of a model"
            )
        return record.name
    run_files = [parent / RUN_FILE for parent in first.folder.resolve().parents[:2]]
    for file in run_files:
        path = _model_of_run(file)
        if path is not None and (Path(path).expanduser().exists() or record is None):
            return path
    if record is None and name and (HUB_NAME.fullmatch(name) or Path(name).expanduser().is_dir()):
        return name
    if not name:
        raise ConfigError(
            f"{first.folder} does not say which base it was trained on: say it, base='MODEL' (on the command line: "
            "--model MODEL)"
        )
    called = f" named {portable_name(name)!r}"
    raise ConfigError(
        f"{first.folder} was trained on a local folder{called}, which is not found from here: say where it is, "
        "base='FOLDER' (on the command line: --model FOLDER)"
    )


def _model_of_run(file: Path) -> str | None:
    """The model of a run.yaml that `kitout train` has written."""
    if not file.is_file():
        return None
    try:
        model = read_yaml(file).get("model")
    except ConfigError:
        return None
    name = model.get("name") if isinstance(model, dict) else model
    return name if isinstance(name, str) else None


def _model_config(name: str, usage: UsageRecord | None, device: str, dtype: str | torch.dtype | None) -> ModelConfig:
    record = usage.base if usage is not None else None
    requested = str(dtype).removeprefix("torch.") if dtype is not None else None
    fields: dict[str, Any] = {"name": name, "device": device, "dtype": requested or "auto"}
    if record is not None:
        fields |= {
            "dtype": requested or record.dtype,
            "attention": record.attention,
            "quantization": record.quantization,
            "revision": record.revision if name == record.name else None,
        }
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        problems = "; ".join(explain(error, ModelConfig))
        raise ConfigError(f"the base cannot be loaded so: {problems}") from error


def _made_up_usage(kit: Kit, task: Task, tokenizer: Any, config: ModelConfig, name: str | None) -> UsageRecord:
    """Of an adapter that says nothing, or of the base alone: what model and tokenizer say of themselves."""
    dtype: Any = str(kit.dtype).removeprefix("torch.")
    base = BaseRecord(name=portable_name(config.name), source="hub", dtype=dtype)
    labels = [] if task.generates_text else _labels_of(kit, name)
    if tokenizer is None:
        return UsageRecord(task=task.name, labels=labels, base=base)
    longest = min(lengths.tokenizer_length(tokenizer) or lengths.DEFAULT_MAX_LENGTH, lengths.DEFAULT_MAX_LENGTH)
    text = TextRecord(
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=template_digest(tokenizer),
        max_length=max_tokens(kit, longest) or longest,
    )
    return UsageRecord(task=task.name, labels=labels, base=base, text=text)


def _labels_of(kit: Kit, name: str | None) -> list[str]:
    """The names of the config where they are as many as the head has outputs, else numbers."""
    named = [str(label) for label in kit.config.id2label.values()]
    having = [] if name is None else [n for n in kit.state.names_with_parts([name]) if kit[n].heads]
    heads = [m for each in having[:1] for m in kit[each].heads.modules() if isinstance(m, nn.Linear)]
    if heads and heads[-1].out_features != len(named):
        return [str(number) for number in range(heads[-1].out_features)]
    return named


def _check_tokenizer(saved: SavedAdapter, text: TextRecord, tokenizer: Any, chat_template: Any, base: str) -> None:
    """chat_template: the tokenizer's own, without a day."""
    if tokenizer_digest(tokenizer) != text.tokenizer:
        raise FileError(
            f"{saved.folder}: the tokenizer of {base} is not the one it was trained with, so every text would be cut "
            "differently: load the base with its own tokenizer, or kitout.load(..., verify=False)"
        )
    dated = copy.copy(tokenizer)
    dated.chat_template = chat_template
    if text.template_date is not None:
        fix_template_date(dated, text.template_date)
    if template_digest(dated) != text.chat_template and text.chat_template is not None:
        warnings.warn(
            f"{saved.folder}: the chat template of {base} has changed since training: prompts are rendered differently",
            stacklevel=4,
        )
