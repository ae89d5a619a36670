"""Numbers that follow from a route or a model, as tensors on a device: made once, because a GPU waits for each copy.

Nobody writes to them. What is traced or transformed (torch.compile, vmap, fake tensors) gets new ones, which belong to
it. It knows tensors only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

KEPT = 1024  # a batch asks for a handful; a kit of many routes for some of each

_copies: Any = WeakTensorKeyDictionary()  # tensor -> {device: its copy}


def may_keep() -> bool:
    """Whether a tensor that is made now is one like any other, and not part of a trace or transform."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return _get_current_dispatch_mode() is None


def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of these numbers, in nested tuples."""
    if not may_keep():
        return torch.tensor(values, device=device, dtype=dtype)
    return _made(values, device, dtype)


@lru_cache(KEPT)
def _made(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # later calls may record a graph
        return torch.tensor(values, device=device, dtype=dtype)


def on_device(t: Tensor, device: torch.device) -> Tensor:
    """A tensor that never changes, on a device."""
    if t.device == device or not may_keep():
        return t.to(device)
    copies = _copies.setdefault(t, {})
    if device not in copies:
        with torch.inference_mode(False):
            copies[device] = t.to(device)
    copy: Tensor = copies[device]
    return copy
