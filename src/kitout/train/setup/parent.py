"""Adapters that a run takes from folders: the one it continues (`train.from`), and the parts of a composition.

Of the one that it continues values go on; optimizer and schedule begin anew. Method and sites have to be the parent's
own, so that what is trained is what was. Parts (`model.adapters`) stay as they are. A folder of kitout says its method,
its labels and its data; a folder of PEFT says what its tensors show. It knows adapter folders and kits, no data and no
loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kitout.errors import ConfigError, Errors, KitoutError
from kitout.files.adapter_json import RECORD, read_adapter_json
from kitout.files.portable_name import portable_name
from kitout.kit import Kit
from kitout.method import Method
from kitout.peft_folders import load_peft
from kitout.runtime.adapter import Adapter
from kitout.train.config.method_field import method_to_dict
from kitout.train.config.schema import RunConfig
from kitout.train.setup.find_inputs import TASKS_WITH_HEADS, peft_task

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
UNKNOWN_DATA = "not recorded"
WITHOUT_HEADS = "without-heads"  # a name on the kit for a moment


@dataclass(frozen=True)
class Parent:
    """An adapter in a folder that a job starts from."""

    folder: Path
    """Where it is."""
    method: Method | None
    """Its method with settings; None: of PEFT's folders, which say so only by their tensors."""
    digest: str
    """SHA-256 of its tensors."""
    data_digest: str
    """Of the examples it was trained on, as its card has it."""
    labels: tuple[str, ...]
    """Of its classifier, in order; empty where it has none or does not say."""
    has_heads: bool = False
    """Whether it holds heads of its own."""

    @property
    def portable_name(self) -> str:
        """Its name without a path of this machine: of a run's own folder the run's name."""
        folder = self.folder.expanduser().absolute()
        return portable_name(str(folder.parent if folder.name == "adapter" else folder))

    def facts(self) -> dict[str, str]:
        """What the card of the new adapter and its metadata say of it."""
        return {"adapter": self.portable_name, "sha256": self.digest, "data_sha256": self.data_digest}


def read_parent(path: str, setting: str = "train.from") -> Parent:
    """What a folder says of its adapter, before a model is loaded. setting: what names the folder, for errors."""
    folder = Path(path).expanduser()
    try:
        if (folder / PEFT_FILES[0]).is_file():
            digest = hashlib.sha256((folder / PEFT_FILES[1]).read_bytes()).hexdigest()
            return Parent(folder, None, digest, UNKNOWN_DATA, ())
        if not (folder / RECORD).is_file():
            inner = folder / "adapter"
            hint = f"; write {setting}={inner}" if (inner / RECORD).is_file() else ""
            raise ConfigError(f"no adapter is there ({RECORD} or PEFT's {PEFT_FILES[0]}){hint}")
        record = read_adapter_json(folder / RECORD)
        note = record.note
        labels = note.get("labels")
        return Parent(
            folder,
            record.method_instance(),
            record.tensors.sha256,
            str(note.get("data_sha256", UNKNOWN_DATA)),
            tuple(map(str, labels)) if isinstance(labels, list) and record.heads else (),
            bool(record.heads),
        )
    except (KitoutError, OSError) as error:
        raise ConfigError(f"{setting}={path}: {error}") from error


def read_parts(adapters: Mapping[str, str]) -> dict[str, Parent]:
    """What the folders of `model.adapters` say. ConfigError names all that cannot be read."""
    errors, parts = Errors(ConfigError, "adapters of a composition"), {}
    for name, path in adapters.items():
        try:
            parts[name] = read_parent(path, f"model.adapters.{name}")
        except ConfigError as error:
            errors.add(str(error))
    errors.raise_if_any()
    return parts


def load_parts(kit: Kit, parts: Mapping[str, Parent]) -> None:
    """Adds adapters under these names, frozen. ConfigError names all that do not fit the base."""
    errors = Errors(ConfigError, "adapters of a composition")
    for name, part in parts.items():
        try:
            adapter = _load(kit, name, part)
        except KitoutError as error:
            errors.add(f"model.adapters.{name}={part.folder}: {error}")
            continue
        adapter.requires_grad_(False)
    errors.raise_if_any()


def adopt_parents(config: RunConfig) -> RunConfig:
    """The config with its parents' methods and labels where it names none. ConfigError for another method."""
    errors = Errors(ConfigError, "train.from continues an adapter as it is")
    is_method_set = "method" in config.model_fields_set
    runs = []
    for number, run in enumerate(config.without_seeds()):
        if run.train.from_ is not None:
            parent = read_parent(run.train.from_)
            is_own = bool(config.jobs) and config.jobs[number].method is not None
            if parent.method is not None and not (is_method_set or is_own):
                run = run.model_copy(update={"method": parent.method})
            elif parent.method is not None and run.method != parent.method:
                errors.add(
                    f"{parent.folder} was trained with method={method_to_dict(parent.method)}, found "
                    f"{method_to_dict(run.method)}: leave method out, or train a new adapter"
                )
            if parent.labels and run.data.labels is None:
                run = run.model_copy(update={"data": run.data.model_copy(update={"labels": parent.labels})})
        runs.append(run)
    errors.raise_if_any()
    if not config.jobs:
        return runs[0]
    jobs = [
        job if run.train.from_ is None else job.model_copy(update={"method": run.method, "data": run.data})
        for job, run in zip(config.jobs, runs, strict=True)
    ]
    return config.model_copy(update={"jobs": tuple(jobs)})


def load_parent(
    kit: Kit, name: str, parent: Parent, method: Method, heads: Mapping[str, nn.Module], label_names: Sequence[str],
    may_lack_heads: bool = False,
) -> None:  # fmt: skip
    """Adds the parent under this name, trainable and not active. heads: those that a new adapter would have.

    may_lack_heads: a parent without any takes these.
    """
    if may_lack_heads and not parent.has_heads:
        _load_without_heads(kit, name, parent, method, heads)
        return
    errors = Errors(ConfigError, f"train.from={parent.folder} does not fit this run")
    is_peft = parent.method is None
    if is_peft and not heads and (task := peft_task(parent.folder)) in TASKS_WITH_HEADS:
        raise ConfigError(
            f"train.from={parent.folder} is a folder of Hugging Face PEFT for {task}, whose head is that of another "
            "model class, and this run trains no head: name a folder for CAUSAL_LM, or leave train.from out"
        )
    try:
        adapter = _load(kit, name, parent)
    except KitoutError as error:
        raise ConfigError(f"train.from={parent.folder}: {error}") from error
    if type(adapter.method) is not type(method):
        errors.add(f"it holds a {type(adapter.method).__name__}: write method={type(adapter.method).__name__}")
    elif is_peft and (requested := method.model_dump(exclude_defaults=True)):
        own = adapter.method.model_dump()
        names = [key for key in requested if key not in ("targets", "layers") and own[key] != requested[key]]
        if names:
            found = ", ".join(f"{key}={own[key]}" for key in names)
            errors.add(
                f"it has {found}, found {', '.join(f'{key}={requested[key]}' for key in names)}: leave method out"
            )
        is_placed = bool({"targets", "layers"} & requested.keys())
        if is_placed and {site.key for site in adapter.sites} != {site.key for site in method.sites(kit.survey)}:
            errors.add("it sits at other sites than method.targets and method.layers select: leave both out")
    if parent.labels and tuple(label_names) != parent.labels:
        errors.add(f"its labels are {', '.join(parent.labels)}, those of this run {', '.join(label_names)}: write "
                   f"data.labels=[{', '.join(parent.labels)}]")  # fmt: skip
    own_heads = {path.replace("/", "."): head.module for path, head in adapter.heads.items()}
    if shapes(own_heads) != shapes(heads):
        errors.add(
            f"its heads are {shapes(own_heads) or 'none'}, this run needs {shapes(heads) or 'none'}: the same labels "
            "(data.labels) and train.head are needed"
        )
    errors.raise_if_any()


def _load_without_heads(kit: Kit, name: str, parent: Parent, method: Method, heads: Mapping[str, nn.Module]) -> None:
    """The heads are new, and all else goes on: a reward model begins as the adapter that was trained on answers."""
    load_parent(kit, WITHOUT_HEADS, parent, method, {}, ())
    before = kit[WITHOUT_HEADS]
    adapter = kit.add(name, before.method, heads=heads, dtype=torch.promote_types(kit.dtype, torch.float32))
    adapter.load_state_dict({**adapter.state_dict(), **before.state_dict()})
    kit.remove(WITHOUT_HEADS)


def _load(kit: Kit, name: str, parent: Parent) -> Adapter:
    """The adapter of a folder, in the dtype in which a run keeps adapters."""
    adapter = load_peft(kit, parent.folder, name) if parent.method is None else kit.load(parent.folder, name=name)
    adapter.to(dtype=torch.promote_types(kit.dtype, torch.float32))
    return adapter


def shapes(heads: Mapping[str, Any]) -> dict[str, list[int]]:
    """Every value of these modules by its name, with its shape."""
    return {
        f"{path}.{key}": list(value.shape) for path, head in heads.items() for key, value in head.state_dict().items()
    }
