"""scale * y + shift as one autograd node, alone or with the frozen linear that gives y.

Of the trained values only the two sums over positions are needed; y is kept for that of the scale, and nothing is kept
for a shift, which a linear takes into its bias. It knows nothing of Deltas or sites.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kitout.methods.deltas.fused_low_rank import own_tensor
from kitout.methods.deltas.fusing import trains_in_one_node


def scale_shift(y: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """scale * y + shift, in the dtype of y."""
    if trains_in_one_node(y, scale, shift):
        result: Tensor = _ScaleShift.apply(y, scale, shift)
        return result
    y = y * scale.to(y.dtype)
    return y if shift is None else y + shift.to(y.dtype)


def linear_scale_shift(x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor, shift: Tensor | None) -> Tensor:
    """scale * (x w^T + b) + shift of a frozen linear in one node; for training."""
    y: Tensor = _LinearScaleShift.apply(x, w, b, scale, shift)
    return y


def linear_shift(x: Tensor, w: Tensor, b: Tensor | None, shift: Tensor) -> Tensor:
    """x w^T + b + shift of a frozen linear in one node; for training."""
    y: Tensor = _LinearShift.apply(x, w, b, shift)
    return y


class _ScaleShift(torch.autograd.Function):
    """The node of both."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        low = scale.to(y.dtype)
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, low)
        ctx.dtypes = scale.dtype, None if shift is None else shift.dtype
        return _scaled(y, low, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, low = ctx.saved_tensors
        return _grads(g, y, low, ctx.dtypes, ctx.needs_input_grad[0], ctx.needs_input_grad[2])


class _LinearScaleShift(torch.autograd.Function):
    """The frozen linear, scaled and shifted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor, shift: Tensor | None) -> Tensor:
        y, low = F.linear(x, w, b), scale.to(x.dtype)
        ctx.save_for_backward(y if ctx.needs_input_grad[3] else None, low, w)
        ctx.dtypes = scale.dtype, None if shift is None else shift.dtype
        return _scaled(y, low, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, low, w = ctx.saved_tensors
        gy, gs, gt = _grads(g, y, low, ctx.dtypes, ctx.needs_input_grad[0], ctx.needs_input_grad[4])
        return None if gy is None else gy @ w, None, None, gs, gt


class _LinearShift(torch.autograd.Function):
    """The frozen linear with the shift in its bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, shift: Tensor) -> Tensor:
        low = shift.to(x.dtype)
        ctx.save_for_backward(w)
        ctx.dtype = shift.dtype
        y = F.linear(x.reshape(-1, x.shape[-1]), w, low if b is None else b + low)
        return own_tensor(y, torch.Size((*x.shape[:-1], len(w))))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        return g @ w if ctx.needs_input_grad[0] else None, None, None, g.sum_to_size(len(w)).to(ctx.dtype)


def _scaled(y: Tensor, low: Tensor, shift: Tensor | None) -> Tensor:
    return y * low if shift is None else torch.addcmul(shift.to(y.dtype), y, low)


def _grads(
    g: Tensor, y: Tensor | None, low: Tensor, dtypes: tuple[torch.dtype, torch.dtype | None], of_y: bool, of_shift: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y (scale applied), of the scale where y was kept for it, and of the shift."""
    gy = gs = gt = None
    if of_shift:
        gt = g.sum_to_size(low.shape).to(dtypes[1])
    if y is not None:
        gy = g * y
        gs = gy.sum_to_size(low.shape).to(dtypes[0])
    if of_y:  # in the memory of the product that has been summed; of a single position the product is the sum
        gy = g * low if gy is None or gy.shape == low.shape else torch.mul(g, low, out=gy)
    return gy if of_y else None, gs, gt
