"""A second device without hardware: plain tensors of device "emulated" over the CPU's memory, for KITOUT_TEST_DEVICE.

What goes wrong on a GPU alone goes wrong here too: tensors of two devices in one operation raise, and what a GPU would
launch, wait for or copy from the host is counted, by the line that asked for it. It says nothing of time. Operations
run on the CPU, behind torch's key for backends of third parties; a tensor keeps its memory, so views and writes are
real. It knows nothing of kitout but the name of its package. Source: torch 2.13, `torch/utils/backend_registration.py`.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "emulated"
_CPU, _EXTENSION = 1, 12  # device types of DLPack
_NO_LAUNCH = ("empty", "empty_strided", "resize_", "_local_scalar_dense")
_WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_consecutive", "bincount")
_WAITS_WITHOUT_SIZE = ("repeat_interleave",)  # but not where the caller says how large the result is
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


@dataclass
class Counts:
    """Of everything since the last reset."""

    launches: Counter[str] = field(default_factory=Counter)
    """Operations on the device, by name."""
    waits: Counter[str] = field(default_factory=Counter)
    """What the host has to wait for, by operation and line."""
    copies: Counter[str] = field(default_factory=Counter)
    """Tensors that come from the host, by operation and line."""

    def reset(self) -> None:
        for counter in (self.launches, self.waits, self.copies):
            counter.clear()


counts = Counts()


class _Device:
    """torch.emulated: what torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It draws from the CPU's generator."""


def install() -> list[torch.library.Library]:
    """Registers the device for the rest of this process. What is returned has to be kept."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Device())
    torch.autograd.set_multithreading_enabled(False)  # the device's own thread would end without Python
    every = torch.library.Library("_", "IMPL")
    every.fallback(_run, "PrivateUse1")
    some = torch.library.Library("aten", "IMPL")
    aten = torch.ops.aten
    # Of these only sizes and storage are touched, so the CPU's own functions are right.
    for op in (
        aten.as_strided.default, aten.view.default, aten._reshape_alias.default, aten.unfold.default,
        aten.set_.source_Storage, aten.set_.source_Storage_storage_offset,
    ):  # fmt: skip
        some.impl(op.name().removesuffix(".default"), _on_metadata(op), "PrivateUse1")
    for op in (aten.convolution_overrideable.default, aten.convolution_backward_overrideable.default):
        some.impl(op.name(), _fallback_for(op), "PrivateUse1")
    some.impl("_local_scalar_dense", _fallback_for(aten._local_scalar_dense.default), "PrivateUse1")
    torch.UntypedStorage.clone = _clone_storage  # type: ignore[method-assign]
    return [every, some]


def _on_metadata(op: Any) -> Any:
    return lambda *args, **kwargs: op._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)


def _fallback_for(op: Any) -> Any:
    return lambda *args, **kwargs: _run(op, *args, **kwargs)


def _is_here(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _with_device(t: Tensor, kind: int) -> Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(t.detach())
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    device = ctypes.c_int32 * 2  # type and number, behind the data's address
    device.from_address(pointer(capsule, b"dltensor") + 8)[:] = [kind, 0]
    return torch._C._from_dlpack(capsule)


def _to_cpu(value: Any) -> Any:
    return _with_device(value, _CPU) if _is_here(value) else value


def _to_device(value: Any) -> Any:
    return _with_device(value, _EXTENSION) if isinstance(value, Tensor) else value


def _clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    clone = torch.empty(storage.nbytes(), dtype=torch.uint8)
    if storage.nbytes():
        ctypes.memmove(clone.data_ptr(), storage.data_ptr(), storage.nbytes())
    return (_to_device(clone) if storage.device.type == NAME else clone).untyped_storage()


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation with tensors of this device, or whose result is to be there."""
    name = op._schema.name.removeprefix("aten::")
    if name.startswith("_copy_from"):
        return _copy(args[0], args[1])
    _count(name, args, kwargs)
    if name == "resize_":
        return _resize(args[0], args[1])
    is_result_here = "device" not in kwargs or torch.device(kwargs["device"]).type == NAME
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    outs = {argument.name: kwargs.pop(argument.name) for argument in op._schema.arguments if argument.is_out}
    lowered: list[tuple[Tensor, Tensor]] = []

    def lower(value: Any) -> Any:
        if not _is_here(value):
            return value
        lowered.append((_with_device(value, _CPU), value))
        return lowered[-1][0]

    def put_back(value: Any) -> Any:
        """What was written to is the caller's tensor."""
        matching = [was for low, was in lowered if low is value]
        return matching[0] if matching else _to_device(value)

    call, args = _cpu_form(op, tuple(_map(lower, value) for value in _unwrap_numbers(op, args)))
    kwargs = {name: _map(lower, value) for name, value in kwargs.items()}
    if outs:
        return _write(call, args, kwargs, outs)
    result = call(*args, **kwargs)
    return _map(put_back, result) if is_result_here else result


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Of a value or of each in a list, which is all that operations take and give."""
    return type(value)(map(function, value)) if type(value) in (list, tuple) else function(value)


def _unwrap_numbers(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers that torch has given for tensors, as tensors."""
    if not any(isinstance(value, (bool, int, float)) for value in args):
        return args
    takes_tensor = [str(argument.type) == "Tensor" for argument in op._schema.arguments]
    wraps = [isinstance(v, (bool, int, float)) and takes for v, takes in zip(args, takes_tensor, strict=False)]
    return tuple(torch.tensor(v) if wrap else v for v, wrap in zip(args, wraps, strict=True))


def _cpu_form(op: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """What the CPU has for an operation, and its arguments."""
    aten = torch.ops.aten
    if op is aten.convolution_overrideable.default:
        return aten.convolution.default, args
    if op is aten.convolution_backward_overrideable.default:
        return aten.convolution_backward.default, (*args[:3], None, *args[3:])
    if op is aten.mm.dtype:
        return aten.mm.default, (args[0].to(args[2]), args[1].to(args[2]))
    return op, args


def _write(call: Any, args: Any, kwargs: Any, outs: dict[str, Tensor]) -> Any:
    """Results into `out=`, which may have any size before."""
    results = {name: torch.empty(0, dtype=out.dtype) for name, out in outs.items()}
    call(*args, **kwargs, **results)
    for name, out in outs.items():
        if out.shape == results[name].shape:
            _to_cpu(out).copy_(results[name])
        else:
            out.data = _to_device(results[name])
    written = tuple(outs.values())
    return written[0] if len(written) == 1 else written


def _resize(t: Tensor, shape: list[int]) -> Tensor:
    if t.shape != torch.Size(shape):
        resized = torch.empty(shape, dtype=t.dtype)
        kept = min(resized.numel(), t.numel())
        resized.view(-1)[:kept] = _to_cpu(t).reshape(-1)[:kept]
        t.data = _to_device(resized)
    return t


def _copy(source: Tensor, into: Tensor) -> Tensor:
    if _is_here(source) and _is_here(into):
        counts.launches["copy_"] += 1
    else:
        (counts.waits if _is_here(source) else counts.copies)[f"copy, {_caller()}"] += 1
    _to_cpu(into).copy_(_to_cpu(source))
    return into


def _count(name: str, args: Any, kwargs: Any) -> None:
    """What a GPU would do for this operation; RuntimeError where it would not."""
    tensors: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        _map(lambda each: tensors.append(each) if isinstance(each, Tensor) else None, value)
    elsewhere = [value for value in tensors if not _is_here(value) and value.dim() > 0]
    if elsewhere and len(elsewhere) < len(tensors):
        if name not in _INDEXING or not _is_here(args[0]):
            found = ", ".join(f"{value.device} {tuple(value.shape)}" for value in tensors)
            raise RuntimeError(f"{name} expects all tensors on one device, and got {found}, {_caller()}")
        counts.copies[f"indices, {_caller()}"] += 1
    is_open = name in _WAITS_WITHOUT_SIZE and kwargs.get("output_size") is None
    if name in _WAITS or is_open or (name in _INDEXING and any(_is_mask(index) for index in args[1])):
        counts.waits[f"{name}, {_caller()}"] += 1
    if name not in _NO_LAUNCH:
        counts.launches[name] += 1


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _caller() -> str:
    """The innermost line at work that is kitout's, a model's library's or PEFT's."""
    frame = sys._getframe()
    while (outer := frame.f_back) is not None:
        frame = outer
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in ("kitout", "transformers", "timm", "peft"):
            return f"{module}:{frame.f_lineno}"
    return "the test"
