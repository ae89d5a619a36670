"""What identifies a frozen base: its keys, its shapes, and a few values of each tensor.

Values are sampled at fixed indices and kept as bf16 codes. An fp32, fp16 or bf16 copy on any device has the same
fingerprint up to the last digit of bf16; another seed or a fine-tuned copy does not. Heads are left out, so a base with
other labels is the same base. Class names do not count. It knows nothing of adapters or of how files are written.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kitout.runtime.state import KitState
from kitout.tensor_version import count_writes

SAMPLES = 32  # values kept per tensor
_GOLDEN = 0.6180339887498949  # index i of a tensor is floor(frac(i * _GOLDEN) * size): spread over rows and columns
_LAST_DIGIT = 1  # codes may differ by this much: fp32 -> fp16 -> bf16 rounds twice
_TINY = 2.0**-24  # below this fp16 keeps nothing
MAX_NAMED = 4  # tensors named per message


class Sampled(BaseModel):
    """One tensor of the base: its shape and some of its values."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    shape: list[int] | None
    """None for a packed (quantized) tensor, whose shape depends on the packing."""
    values: str
    """base64 of little-endian bf16 codes; empty where nothing can be read (packed, or on the meta device)."""


class Fingerprint(BaseModel):
    """The keys, shapes and sampled values of a base."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    valued: bool
    """False if the base was on the meta device, so that only shapes could be kept."""
    left_out: list[str]
    """Paths of modules whose tensors are not compared (heads)."""
    tensors: dict[str, Sampled]
    """By key."""


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base and where it is held, so that a change of either is detected."""

    key: str
    owner: dict[str, Any]
    """The dict that holds it: `_parameters` or `_buffers` of a module, or those kept by a merge."""
    name: str
    """Its key in `owner`."""
    tensor: Tensor
    version: int
    """The tensor's version counter when it was read."""

    @property
    def is_unchanged(self) -> bool:
        return self.owner.get(self.name) is self.tensor and count_writes(self.tensor) == self.version


_fingerprints: WeakKeyDictionary[KitState, tuple[list[BaseTensor], Fingerprint]] = WeakKeyDictionary()


def fingerprint(state: KitState, adapted: Iterable[str], replaced: Iterable[str] = ()) -> Fingerprint:
    """Of the kit's frozen base (unmerged), for an adapter at these module paths that replaces these modules.

    A head that the adapter itself sits at is part of what it was made for, and is compared.
    """
    whole_base = _whole_base(state)
    heads = {s.path for s in state.survey.sites if s.role == "head"} - set(adapted)
    left_out = sorted(heads | set(replaced))
    return Fingerprint(valued=whole_base.valued, left_out=left_out, tensors=_without(whole_base.tensors, left_out))


def differences(saved: Fingerprint, current: Fingerprint) -> list[str]:
    """What is different in keys, shapes and values, as messages; none if an adapter for one base fits the other."""
    left_out = {*saved.left_out, *current.left_out}
    old, new = _without(saved.tensors, left_out), _without(current.tensors, left_out)
    if old == new:
        return []
    shared = [key for key in old if key in new]
    messages = []
    if missing := [key for key in old if key not in new]:
        messages.append(f"keys: this base lacks {_name_some(missing)}")
    if extra := [key for key in new if key not in old]:
        messages.append(f"keys: this base also has {_name_some(extra)}")
    if shapes := [k for k in shared if None not in (old[k].shape, new[k].shape) and old[k].shape != new[k].shape]:
        messages.append(f"shapes: {_name_some(f'{k} was {old[k].shape}, here {new[k].shape}' for k in shapes)}")
    same_shape = [key for key in shared if key not in set(shapes)]
    if values := [key for key in same_shape if not _is_close(old[key], new[key])]:
        messages.append(f"values: {len(values)} of {len(shared)} tensors hold other numbers: {_name_some(values)}")
    return messages


def parameters_before_merge(state: KitState) -> dict[int, Tensor]:
    """id of a parameter that a merge has put into the base -> the base's own parameter in its place."""
    before: dict[int, Tensor] = {}
    for backup in state.backups.values():
        for name, unmerged in backup.parameters.items():
            merged = backup.owner._parameters.get(name)
            if unmerged is not None and merged is not None:
                before[id(merged)] = unmerged
    return before


def _whole_base(state: KitState) -> Fingerprint:
    """The whole base, read once per kit; read again if a tensor has changed since."""
    cached = _fingerprints.get(state)
    # While merged, the base's own tensors are in the kit's backup and do not change.
    if cached is not None and (state.merged_names or all(t.is_unchanged for t in cached[0])):
        return cached[1]
    tensors = list(_base_tensors(state))
    whole_base = Fingerprint(valued=not any(t.tensor.is_meta for t in tensors), left_out=[], tensors=_sample(tensors))
    _fingerprints[state] = tensors, whole_base
    return whole_base


def _base_tensors(state: KitState) -> Iterator[BaseTensor]:
    """Parameters and persistent floating-point buffers of the base as it is unmerged."""
    backups = state.backups
    replaced = {path: b.child[1] for path, b in backups.items() if b.child is not None}
    roots = [("", state.base), *replaced.items()]
    for root, top in roots:
        for path, module in top.named_modules(prefix=root):
            if not root and any(path == r or path.startswith(r + ".") for r in replaced):
                continue
            is_merged = path in backups and path not in replaced
            parameters = backups[path].parameters if is_merged else module._parameters
            buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
            for owner, tensors in ((parameters, parameters), (module._buffers, buffers)):
                for name, tensor in tensors.items():
                    if tensor is not None and (owner is parameters or tensor.is_floating_point()):
                        key = f"{path}.{name}" if path else name
                        yield BaseTensor(key, owner, name, tensor, count_writes(tensor))


@torch.no_grad()
def _sample(base_tensors: list[BaseTensor]) -> dict[str, Sampled]:
    indices: dict[tuple[int, torch.device], Tensor] = {}
    samples: dict[torch.device, list[Tensor]] = {}
    shapes: dict[str, tuple[list[int] | None, torch.device | None, int]] = {}
    for base_tensor in base_tensors:
        t = base_tensor.tensor.data
        if type(t) is not Tensor or not t.is_floating_point() or t.dtype.itemsize < 2:
            shapes[base_tensor.key] = None, None, 0
            continue
        if t.is_meta or not t.numel():
            shapes[base_tensor.key] = list(t.shape), None, 0
            continue
        size_and_device = (t.numel(), t.device)
        if size_and_device not in indices:
            indices[size_and_device] = _sample_indices(*size_and_device)
        sample = t.take(indices[size_and_device])
        samples.setdefault(t.device, []).append(sample.to(torch.bfloat16))
        shapes[base_tensor.key] = list(t.shape), t.device, sample.numel()
    # One transfer per device, not one per tensor.
    codes = {device: torch.cat(parts).view(torch.int16).cpu().numpy() for device, parts in samples.items()}
    offsets = dict.fromkeys(codes, 0)
    sampled = {}
    for key, (shape, device, n) in shapes.items():
        text = ""
        if device is not None:
            chunk = codes[device][offsets[device] : offsets[device] + n]
            offsets[device] += n
            text = base64.b64encode(chunk.astype("<i2").tobytes()).decode()
        sampled[key] = Sampled(shape=shape, values=text)
    return sampled


def _sample_indices(size: int, device: torch.device) -> Tensor:
    if size <= SAMPLES:
        return torch.arange(size, device=device)
    steps = torch.arange(SAMPLES, dtype=torch.float64) * _GOLDEN
    return (steps.frac() * size).long().to(device)


def _is_close(old: Sampled, new: Sampled) -> bool:
    """Equal up to the last digit of bf16; True where one side has no values to compare."""
    if old.values == new.values or not old.values or not new.values:
        return True
    try:
        a, b = (np.frombuffer(base64.b64decode(s.values, validate=True), dtype="<i2") for s in (old, new))
    except ValueError:
        return False
    if a.shape != b.shape:
        return False
    near = np.abs(_order(a) - _order(b)) <= _LAST_DIGIT
    small = np.maximum(np.abs(_float(a)), np.abs(_float(b))) <= _TINY
    return bool((near | small).all())


def _order(code: Any) -> Any:
    """bf16 codes as integers in the order of their values."""
    code = code.astype(np.int32)
    return np.where(code >= 0, code, -(code & 0x7FFF))


def _float(code: Any) -> Any:
    return (code.astype(np.int32) << 16).view(np.float32)


def _without(tensors: dict[str, Sampled], paths: Iterable[str]) -> dict[str, Sampled]:
    prefixes = tuple(f"{path}." for path in paths)
    return {key: value for key, value in tensors.items() if not key.startswith(prefixes)} if prefixes else tensors


def _name_some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
