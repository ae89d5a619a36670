"""A scale and a shift by channel: y' = scale * y + shift. Folds into linears, convolutions, tables and norms.

Shared by the methods that rescale what a frozen module gives (a norm's own gain and shift, the whole of SSF). It knows
nothing of where it sits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kitout.delta import Delta
from kitout.methods.deltas.fused_affine import linear_scale_shift, scale_shift
from kitout.methods.deltas.fusing import is_fusable


class ScaleShift(Delta):
    """y' = scale * y + shift. std: of the initial values, scale ~ N(1, std), shift ~ N(0, std)."""

    is_scale_shift = True

    def __init__(self, width: int, std: float = 0.0, has_shift: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(1.0 + std * torch.randn(width))
        self.shift = nn.Parameter(std * torch.randn(width)) if has_shift else None

    def forward(self, x: Tensor, y: Tensor, frozen: Any = None) -> Tensor:
        return scale_shift(y, self.scale, self.shift)

    def fused_linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        if not (torch.is_grad_enabled() and self.scale.requires_grad and is_fusable(x, w)):
            return None
        return linear_scale_shift(x, w, b, self.scale, self.shift)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.to(w.dtype)
        b = None if b is None else b * scale
        if self.shift is not None:
            b = self.shift.to(w.dtype) if b is None else b + self.shift.to(w.dtype)
        return w * scale[:, None], b
