"""Trained biases: a shift alone (BitFit), and low-rank changes with a shift on top (LoRA and DoRA with `bias`).

The shift starts at zero and is the difference from the frozen bias, or a new one where the module has none. With a
low-rank change it has no batched form over rows: each row's adapter runs by itself. It knows nothing of which biases a
model has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.weights import FrozenModule
from kitout.delta import Delta, LowRankChange
from kitout.methods.deltas.dora import DoRADelta
from kitout.methods.deltas.fused_affine import linear_shift
from kitout.methods.deltas.fusing import is_fusable
from kitout.methods.deltas.low_rank import LowRankDelta

BIASED_KINDS = ("linear", "norm", "conv")  # of sites whose modules may have a bias


class ShiftDelta(Delta):
    """y' = y + shift."""

    is_scale_shift = True
    adds_linear_map = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y: Tensor, frozen: Any = None) -> Tensor:
        return y + self.shift.to(y.dtype)

    def fused_linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        if not (torch.is_grad_enabled() and self.shift.requires_grad and is_fusable(x, w)):
            return None
        return linear_shift(x, w, b, self.shift)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift = self.shift.to(w.dtype)
        return w, shift if b is None else b + shift

    def low_rank_change(self) -> LowRankChange | None:
        return LowRankChange(None, None, self.shift)


class ShiftedDelta(Delta):
    """y' = what the class after it computes, + shift. That class has the factors `a` and `b`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shift = nn.Parameter(torch.zeros(self.get_parameter("b").shape[0]))

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        return super().forward(x, y, frozen) + self.shift.to(y.dtype)

    def forward_(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        return Delta.forward_(self, x, y, frozen)

    def fused_linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        y = super().fused_linear(x, w, b)
        return None if y is None else y + self.shift.to(y.dtype)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w, b = super().fold(w, b)
        shift = self.shift.to(w.dtype)
        return w, shift if b is None else b + shift

    def low_rank_change(self) -> LowRankChange | None:
        change = super().low_rank_change()
        return None if change is None else change._replace(shift=self.shift)

    @classmethod
    def forward_rows(
        cls, deltas: Sequence[Any], rows: Sequence[int], x: Tensor, y: Tensor, cache: dict[str, Any]
    ) -> Tensor | None:
        return None


class ShiftedLowRank(ShiftedDelta, LowRankDelta):
    """LoRA and a shift."""


class ShiftedDoRA(ShiftedDelta, DoRADelta):
    """DoRA and a shift."""
