"""The bottleneck of adapters: y' = y + s * up(dropout(act(down(v)))), d -> b -> d, with a bias each.

Serial, parallel and post-norm adapters differ in what v is. Over a bf16 base the values stay fp32 and the products
run in the base's dtype. It knows nothing of where it sits: that is each method's own file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.base.weights import FrozenModule
from kitout.delta import Delta
from kitout.errors import TargetError
from kitout.method import Method
from kitout.methods.deltas.fused_bottleneck import add_bottleneck
from kitout.methods.deltas.fusing import trains_in_one_node

BottleneckInput = Literal["y", "x", "norm"]
BottleneckInit = Literal["truncated", "normal", "zero"]
Activation = Literal["relu", "gelu", "silu"]


def _check_nonzero(scale: float | str) -> float | str:
    if scale == 0:
        raise ValueError("a scale of 0 leaves every parameter without a gradient")
    return scale


BottleneckScale = Annotated[float | Literal["learned"], AfterValidator(_check_nonzero)]


class Bottleneck(Delta):
    """y' = y + scale * up(dropout(act(down(v)))).

    reads: v is "y" (serial), "x" (parallel), or "norm": LN(x + y) with the frozen norm after this sublayer.
    scale: a number, or "learned": one more parameter, which starts at 1.
    init: "zero" is LoRA's (down kaiming_uniform(a = sqrt 5), up 0: the identity), "normal" is N(0, std) and "truncated"
    the same within two std, for both. Biases start at 0.
    """

    def __init__(
        self,
        d: int,
        width: int,
        *,
        reads: BottleneckInput = "y",
        activation: Activation = "relu",
        scale: BottleneckScale = 1.0,
        dropout: float = 0.0,
        init: BottleneckInit = "zero",
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d, width), nn.Linear(width, d)
        self.reads, self.activation, self.dropout = reads, activation, dropout
        self.reads_weight = reads == "norm"
        self.scale = nn.Parameter(torch.ones(1)) if scale == "learned" else float(scale)
        for linear in (self.down, self.up):
            nn.init.zeros_(linear.bias)
            if init == "truncated":
                nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            elif init == "normal":
                nn.init.normal_(linear.weight, std=std)
        if init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        """x, y [..., d] -> [..., d]."""
        dtype, v = y.dtype, x if self.reads == "x" else y
        if self.reads == "norm":
            assert frozen is not None
            v = frozen.norm(x + y)
        if trains_in_one_node(y, self.up.weight) and not torch.is_autocast_enabled(y.device.type):
            weights = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
            mask = None
            if self.dropout and self.training:
                mask = F.dropout(y.new_ones(*y.shape[:-1], len(self.down.bias)), self.dropout)
            return add_bottleneck(None if v is y else v, y, weights, self.scale, self.activation, mask)
        h = F.linear(v.to(dtype), self.down.weight.to(dtype), self.down.bias.to(dtype))
        h = F.dropout(getattr(F, self.activation)(h), self.dropout, self.training)
        out = F.linear(h, self.up.weight.to(dtype), self.up.bias.to(dtype))
        return y + (out * self.scale if isinstance(self.scale, float) else out * self.scale.to(dtype))


def bottleneck_size(d: int, width: int, scale: object = 1.0) -> int:
    """Trainable parameters of one bottleneck: 2 b d + b + d, and one for a learned scale."""
    return 2 * width * d + width + d + (scale == "learned")


def default_sites(method: Method, survey: Survey, roles: Sequence[str]) -> list[Site]:
    """The method's sites. By default every block must have these sublayers, so that no block is left out silently."""
    if method.targets is None and (blocks := survey.blocks_missing(*roles)):
        shown = ", ".join(blocks[:3]) + (", ..." if len(blocks) > 3 else "")
        was_seen = any(site.role in roles for site in survey.sites)
        raise TargetError(
            f"{type(method).__name__} sits at {' and '.join(roles)} of every block, and their ends were not seen in "
            f"{shown}" + (f"; write targets={method.default_targets!r} to use those that were" if was_seen else "")
        )
    return select(survey.sites, method.targets or method.default_targets, method.layers)
