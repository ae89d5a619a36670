"""y + scale * up(act(down(v))) as one autograd node.

Kept are v, what enters the activation and what leaves it. The scale goes into the thin up-projection, the residual sum
into memory that is there, and where v is y its gradient is one product onto the other. It knows tensors alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATION_GRADS: dict[str, Any] = {
    "relu": lambda g, h: torch.ops.aten.threshold_backward(g, h, 0),
    "gelu": lambda g, h: torch.ops.aten.gelu_backward(g, h),
    "silu": lambda g, h: torch.ops.aten.silu_backward(g, h),
}


def add_bottleneck(
    v: Tensor | None,
    y: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float | Tensor,
    activation: str,
    mask: Tensor | None,
) -> Tensor:
    """v: None where it is y. weights: of down, then of up, each with its bias. mask: of dropout, [..., width]."""
    number, trained = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    result: Tensor = _AddBottleneck.apply(v, y, *weights, trained, number, activation, mask)
    return result


class _AddBottleneck(torch.autograd.Function):
    """The node. Its trained scale, if there is one, is a tensor of one value."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor | None,
        y: Tensor,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        trained: Tensor | None,
        scale: float,
        activation: str,
        mask: Tensor | None,
    ) -> Tensor:
        dtype = y.dtype
        low, low_up, bias = down.to(dtype), up.to(dtype), up_bias.to(dtype)
        factor = scale if trained is None else trained.to(dtype)
        scaled, scaled_bias = (low_up, bias) if trained is None and scale == 1 else (low_up * factor, bias * factor)
        v2 = _rows(y if v is None else v.to(dtype))
        h = F.linear(v2, low, down_bias.to(dtype))
        a = getattr(F, activation)(h)
        if mask is not None:
            a = a * mask.view(a.shape)
        out = F.linear(a, scaled, scaled_bias)
        ctx.save_for_backward(v2, h, a, low, scaled, mask, trained, up, up_bias)
        ctx.scale, ctx.activation, ctx.v_shape = scale, activation, None if v is None else v.shape
        ctx.dtypes = (down.dtype, down_bias.dtype, up.dtype, up_bias.dtype)
        return torch.ops.aten._unsafe_view(out.add_(_rows(y)), y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        v2, h, a, low, scaled, mask, trained, up, up_bias = ctx.saved_tensors
        g2 = _rows(g)
        ga = g2 @ scaled  # [N, width]
        up_grad, bias_grad = (a.t() @ g2).t(), g2.sum(0)
        scale_grad = None
        if trained is not None:
            scale_grad = (up_grad * up).sum() + (bias_grad * up_bias).sum()
            scale_grad = scale_grad.to(trained.dtype).view(trained.shape)
        factor = ctx.scale if trained is None else trained
        if trained is not None or factor != 1:
            up_grad, bias_grad = up_grad * factor, bias_grad * factor
        if mask is not None:
            ga = ga.mul_(mask.view(ga.shape))
        gh = ACTIVATION_GRADS[ctx.activation](ga, h)
        gy, gv = g, None
        if ctx.v_shape is None:
            if ctx.needs_input_grad[1]:
                gy = torch.addmm(g2, gh, low).view(g.shape)
        elif ctx.needs_input_grad[0]:
            gv = (gh @ low).view(ctx.v_shape)
        grads = (gh.t() @ v2, gh.sum(0), up_grad, bias_grad)
        return gv, gy, *(t.to(dtype) for t, dtype in zip(grads, ctx.dtypes, strict=True)), scale_grad, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
