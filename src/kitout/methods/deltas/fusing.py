"""When a map may be an autograd node of its own instead of a chain of plain operations.

A node of ours saves what it needs and nothing else, writes where it may and takes every product in its fast
orientation, with few calls, because on a GPU a small batch waits for them. What follows plain operations alone
(torch.compile, vmap, autocast) gets those. It knows no map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kitout import fast

# Where a product may have an output of its own dtype (torch 2.8 and later; not on ROCm).
OUT_DTYPE_DEVICES = ("cuda",) if "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None else ()


def is_traced() -> bool:
    """torch.compile, vmap and the like follow plain operations only: no autograd node of ours, nothing in place."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_fusable(x: Tensor, w: Tensor) -> bool:
    """A frozen linear with weight w, called with x, and what is added to it may be one autograd node."""
    return x.dtype == w.dtype and not is_traced() and not torch.is_autocast_enabled(x.device.type)


def trains_in_one_node(y: Tensor, *values: Tensor | None) -> bool:
    """A map of y by these trained values may be one autograd node, and one is needed."""
    if not (fast.enabled() and torch.is_grad_enabled()) or is_traced():
        return False
    return (y.requires_grad or any(v is not None and v.requires_grad for v in values)) and y.is_floating_point()


def scaled_to(t: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * t in a dtype, in one call: not on a CPU, where that takes longer, nor on mps, where it was not tried."""
    if t.is_cpu or t.dtype == dtype or t.is_mps:
        return (t * scale).to(dtype)
    return torch.mul(t, scale, out=torch.empty(t.shape, dtype=dtype, device=t.device))


def product_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of two matrices in a dtype: without rounding and a second call where the device has that."""
    if a.is_cpu or dtype != torch.float32 or a.dtype not in (torch.bfloat16, torch.float16):
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype) if a.device.type in OUT_DTYPE_DEVICES else (a @ b).to(dtype)
