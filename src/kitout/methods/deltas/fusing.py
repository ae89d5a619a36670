"""When a map may be an autograd node of its own instead of a chain of plain operations.

A node of ours saves what it needs and nothing else, writes where it may and takes every product in its fast
orientation. What follows plain operations alone (torch.compile, vmap, autocast) gets those. It knows no map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kitout import fast


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
