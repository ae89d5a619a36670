"""kitout's own adapter folder: adapter.safetensors and adapter.json, written whole or not at all, read without trust.

Tensors are named "<site>.<parameter>" (sites with "/" for "."), "@shared...." and "@head/<path>....". A load checks the
record, the base, every site and every tensor before anything is added to the kit. It knows no method and no
architecture. The fields of the record are in `adapter_json.py`; `adapter_tensors.py` builds an adapter again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.errors import (
    ConfigError,
    Errors,
    FileError,
    InvalidAdapterName,
    KitoutError,
    MergeStateError,
    RouteError,
    TargetError,
)
from kitout.files import float_steps
from kitout.files.adapter_json import FORMAT, RECORD, TENSORS, AdapterJson, SiteEntry, TensorsEntry, read_adapter_json
from kitout.files.adapter_tensors import (
    TensorSlot,
    build_empty,
    check_tensors,
    fill_and_register,
    non_finite_names,
    stored_tensors,
    tensor_slots,
)
from kitout.files.atomic import check_replaceable, replace_folder
from kitout.files.base_fingerprint import fingerprint
from kitout.files.head_spec import build_from_spec, spec_of
from kitout.files.model_fit import check_base, find_sites_of
from kitout.files.part_folders import (
    PARTS,
    check_parts_replaceable,
    discard_parts,
    load_parts,
    part_digests,
    part_names,
)
from kitout.files.portable_name import name_of_model
from kitout.files.safetensors_reader import SafetensorsFile, open_tensors, write_tensors
from kitout.files.system_errors import as_path, as_path_error
from kitout.files.usage_record import UsageRecord
from kitout.method import Method
from kitout.runtime.adapter import Adapter
from kitout.runtime.build_adapter import check_head, check_name, head_site
from kitout.runtime.parts import check_parts
from kitout.runtime.state import KitState
from kitout.version import __version__

FILES = (RECORD, TENSORS)
RETRIES = 5  # while a folder is replaced under a reader


@torch.no_grad()
def save_adapter(
    state: KitState,
    name: str,
    folder: str | PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    keep_encoder: bool = False,
) -> None:
    """Writes one adapter into a new or empty folder, or replaces an adapter folder in one step.

    The parts of a composition go with it, into the folder parts/. keep_encoder: keep what only training needs (the
    encoder of a prefix), which is folded otherwise. metadata: anything json can hold, kept with the adapter; None keeps
    what it was loaded with. Raises FileError where the folder holds other files or a value is NaN or infinite.
    """
    target = as_path(folder)
    with as_path_error("written", target):
        check_replaceable(target, FILES, [PARTS])
        check_parts_replaceable(target, FILES)
    writers = {part: _writer(state, part, None, keep_encoder) for part in part_names(state, state[name])}
    write = _writer(state, name, metadata, keep_encoder)

    def write_into(temp_path: Path) -> None:
        write(temp_path)
        for part, write_part in writers.items():
            (temp_path / PARTS / part).mkdir(parents=True)
            write_part(temp_path / PARTS / part)

    with as_path_error("written", target):
        replace_folder(target, FILES, write_into, [PARTS])


def _writer(
    state: KitState, name: str, metadata: Mapping[str, Any] | None, keep_encoder: bool
) -> Callable[[Path], None]:
    """Checks one adapter; the function writes its two files into a folder."""
    adapter = state[name] if keep_encoder else state[name].inference_form()
    slots = tensor_slots(adapter)
    if bad := non_finite_names({n: s.tensor for n, s in slots.items()}):
        raise FileError(f"{name!r} holds NaN or infinity in {', '.join(bad[:4])}: there is nothing worth saving in it")
    dtype = _common_dtype(slots)
    if dtype == "mixed" and any(s.base is not None for s in slots.values()):
        raise FileError(f"{name!r} holds trained copies in several dtypes: convert them to one, kit[{name!r}].float()")
    note = adapter.metadata if metadata is None else metadata
    if not isinstance(note, Mapping) or not all(isinstance(key, str) for key in note):
        raise FileError(f"metadata cannot be written as json: it is a dict with texts for keys, found {str(note)[:80]}")
    tensors, parts = stored_tensors(state, adapter), part_digests(state, adapter, keep_encoder)
    head_paths = [path.replace("/", ".") for path in adapter.heads]

    def write(folder: Path) -> None:
        size, digest = write_tensors(folder / TENSORS, tensors, {"format": "pt"})
        record = AdapterJson(
            format=FORMAT,
            kitout=__version__,
            name=name,
            method=type(adapter.method).__name__,
            settings=adapter.method.model_dump(mode="json"),
            seed=adapter.seed,
            strength=adapter.strength,
            dtype=dtype,
            parameters=sum(p.numel() for p in adapter.parameters()),
            sites=[SiteEntry.of(s) for s in adapter.sites],
            heads=[spec_of(path, _head(adapter, path), state.base) for path in head_paths],
            tensors=TensorsEntry(bytes=size, sha256=digest),
            base=fingerprint(state, [s.path for s in adapter.sites], head_paths),
            note=dict(note),
            base_name=name_of_model(state.base) if adapter.usage is None else None,
            usage=None if adapter.usage is None else UsageRecord.model_validate(adapter.usage),
            parts=parts,
        )
        record.write(folder / RECORD)

    return write


def load_adapter(
    state: KitState,
    folder: str | PathLike[str],
    *,
    name: str | None = None,
    heads: Mapping[str, nn.Module] | None = None,
    verify: bool = True,
) -> Adapter:
    """Adds the adapter that a folder holds, trainable and not active. name: by default the one it was saved under.

    heads: modules for heads whose class a file cannot describe. verify: False compares no digests, so that a folder
    edited by hand loads; every other check stays. Raises WrongBase, FileError, AdapterExists or InvalidAdapterName and
    leaves the kit as it was.
    """
    state.check_attached()
    folder_path = as_path(folder)
    for _ in range(RETRIES):
        stamp = _stamp(folder_path)
        try:
            with as_path_error("read", folder_path):
                return _load_once(state, folder_path, name, heads or {}, verify)
        except FileError:
            if _stamp(folder_path) == stamp:  # else another process has replaced the folder between its two files
                raise
    with as_path_error("read", folder_path):
        return _load_once(state, folder_path, name, heads or {}, verify)


def _stamp(folder_path: Path) -> tuple[int, int] | None:
    """Changes when the folder's record is replaced."""
    try:
        status = (folder_path / RECORD).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _load_once(
    state: KitState,
    folder_path: Path,
    name: str | None,
    heads: Mapping[str, nn.Module],
    verify: bool,
    chain: tuple[str, ...] = (),
) -> Adapter:
    """chain: the compositions that this adapter is loaded for."""
    record = read_adapter_json(_existing_file(folder_path, RECORD), verify)
    if state.merged_names:
        raise MergeStateError(f"{state.merged_text} merged into the base: unmerge() before loading {folder_path}")
    _check_name(state, folder_path, record, name)
    method = _with_path(folder_path, record.method_instance)
    chain = (*chain, name or record.name)

    def load_part(path: Path, part: str, chain: tuple[str, ...]) -> Adapter:
        return _load_once(state, path, part, {}, verify, chain)

    added = load_parts(state, folder_path, record, method.part_names(), load_part, chain, verify)
    try:
        check_parts(state, chain[-1], method)
        return _load_checked(state, folder_path, record, method, chain[-1], heads, verify)
    except BaseException:
        discard_parts(state, added)
        raise


def _load_checked(
    state: KitState,
    folder_path: Path,
    record: AdapterJson,
    method: Method,
    name: str,
    heads: Mapping[str, nn.Module],
    verify: bool,
) -> Adapter:
    """The adapter of a record whose parts the kit has."""
    tensors = open_tensors(_existing_file(folder_path, TENSORS))
    with tensors.file:
        check_base(state, folder_path, record)
        sites, left_out = _with_path(folder_path, lambda: find_sites_of(state, record, method))
        adapter, slots = _build_empty(state, folder_path, record, name, method, sites, heads)
        _check_header(folder_path, record, tensors, slots)
        stored, digest = tensors.read()
    values = _values(folder_path, record, slots, stored, digest if verify else record.tensors.sha256)
    adapter.seed, adapter.metadata, adapter.left_out = record.seed, dict(record.note), left_out
    adapter.usage = None if record.usage is None else record.usage.model_dump()
    _with_path(folder_path, lambda: fill_and_register(state, adapter, slots, values, record.strength))
    return adapter


def _check_name(state: KitState, folder_path: Path, record: AdapterJson, name: str | None) -> None:
    """An invalid name is InvalidAdapterName where the caller gave it, FileError where it comes from the file."""
    try:
        check_name(state, record.name if name is None else name)
    except InvalidAdapterName as error:
        if name is not None:
            raise
        raise FileError(
            f"{folder_path}: {str(error)[:300]}. Or load it under another: kit.load(folder, name=...)"
        ) from None


def _existing_file(folder: Path, file: str) -> Path:
    if not (folder / file).exists():
        present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        files, inside = present[:6], [name for name in present if (folder / name / RECORD).is_file()]
        there = "it is a file: name the folder it lies in" if folder.is_file() else "there is no such folder"
        hint = f"it holds {', '.join(files)}" if files else "it is empty" if folder.is_dir() else there
        if inside:
            hint += f". It holds the folders of several adapters: load one of them, {str(folder / inside[0])!r}"
        elif "adapter_config.json" in present:
            hint += ". That is a folder of Hugging Face PEFT: kitout.load_peft(kit, folder, name)"
        elif "model.safetensors" in present:
            hint += (
                ". If Trainer saved a kit there whose base is no transformers model, these are its values alone: add "
                "the same adapters and kit.load_state_dict(safetensors.torch.load_file(folder / 'model.safetensors')), "
                "then kit.save(name, folder)"
            )
        raise FileError(f"{folder} is not an adapter folder ({file} is missing): {hint}")
    return folder / file


def _with_path(folder_path: Path, step: Any) -> Any:
    """Runs a step of reading and puts the folder before its message."""
    try:
        return step()
    except (FileError, TargetError, ConfigError, RouteError) as error:
        raise FileError(f"{folder_path}: {error}") from None


def _build_empty(
    state: KitState,
    folder_path: Path,
    record: AdapterJson,
    name: str,
    method: Any,
    sites: list[Site],
    head_modules: Mapping[str, nn.Module],
) -> tuple[Adapter, dict[str, TensorSlot]]:
    errors = Errors(FileError, str(folder_path))
    modules = {}
    for head in record.heads:
        try:
            head_site(state, head.path)
            modules[head.path] = check_head(state, head.path, build_from_spec(head, state.base, head_modules))
        except (FileError, TargetError) as error:
            errors.add(str(error))
    if unknown := [path for path in head_modules if path not in {h.path for h in record.heads}]:
        errors.add(f"heads: the adapter has none at {', '.join(unknown)}")
    errors.raise_if_any()
    try:
        return build_empty(state, name, method, sites, modules)
    except KitoutError as error:
        raise FileError(f"{folder_path}: {error}") from None


def _check_header(
    folder_path: Path, record: AdapterJson, tensors: SafetensorsFile, slots: Mapping[str, TensorSlot]
) -> None:
    """The header of the tensors' file lists exactly what this adapter needs: size, names, shapes, dtypes."""
    errors = Errors(FileError, str(folder_path))
    if tensors.size != record.tensors.bytes:
        errors.add(f"{TENSORS} has {tensors.size:,} bytes, {RECORD} says {record.tensors.bytes:,}")
    adapter_dtype = None if record.dtype == "mixed" else getattr(torch, record.dtype)
    stored = {n: (e.dtype, e.shape) for n, e in tensors.entries.items()}
    for key, slot in slots.items():
        if key not in stored:
            continue
        dtype, shape = stored[key]
        if slot.base is not None and adapter_dtype is not None:  # kept as integer steps
            expected, stored[key] = float_steps.steps_of(adapter_dtype), (adapter_dtype, shape)
        else:
            expected = adapter_dtype if adapter_dtype is not None and dtype.is_floating_point else dtype
        if dtype != expected:
            errors.add(f"tensor {key!r} has dtype {dtype}, {RECORD} says {record.dtype}: it must be {expected}")
    check_tensors(slots, stored, errors)
    if record.dtype == "mixed" and any(s.base is not None for s in slots.values()):
        errors.add(f"{RECORD} says mixed dtypes, and trained copies have one")
    count = sum(s.tensor.numel() for s in slots.values() if isinstance(s.tensor, nn.Parameter))
    if record.parameters != count:
        errors.add(f"{RECORD} says {record.parameters:,} parameters, this adapter has {count:,}")
    errors.raise_if_any()


def _values(
    folder_path: Path, record: AdapterJson, slots: Mapping[str, TensorSlot], stored: dict[str, Tensor], digest: str
) -> dict[str, Tensor]:
    if digest != record.tensors.sha256:
        raise FileError(f"{folder_path}: {TENSORS} is not the file {RECORD} was written with (sha256 {digest[:12]}..., "
            f"not {record.tensors.sha256[:12]}...): it was damaged or exchanged; copy the folder again")  # fmt: skip
    values = dict(stored)
    with torch.no_grad():
        for key, slot in slots.items():
            if slot.base is not None:
                values[key] = float_steps.from_steps(stored[key], slot.base, getattr(torch, record.dtype))
    if bad := non_finite_names(values):
        raise FileError(f"{folder_path}: NaN or infinity in {', '.join(bad[:4])}")
    return values


def _common_dtype(slots: Mapping[str, TensorSlot]) -> Any:
    kinds = {str(s.tensor.dtype).removeprefix("torch.") for s in slots.values() if s.tensor.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _head(adapter: Adapter, path: str) -> nn.Module:
    module = adapter.heads[path.replace(".", "/")].module
    assert isinstance(module, nn.Module)
    return module
