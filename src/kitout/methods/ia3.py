"""(IA)^3: learned vectors that rescale keys, values and the feed-forward activations.

Liu et al. 2022 (arXiv 2205.05638), eq. 1 and figure 1; code r-three/t-few (configs/ia3.json). K' = l_k * (W_k x),
V' = l_v * (W_v x), FFN = W_2 (l_ff * act(W_1 x)), every l initialized to 1, also on cross-attention; never on q. The
FFN vector sits on the input of the down projection, which is the same place for gated blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.delta import Delta
from kitout.method import Method, TrainingDefaults, register
from kitout.methods.deltas.fused_affine import linear_scale_shift, scale_shift
from kitout.methods.deltas.fusing import is_fusable

PRESETS = {"paper": "attn.k attn.v in:mlp.down", "qkv": "attn.q attn.k attn.v"}


class ScaleDelta(Delta):
    """y' = scale * y."""

    is_scale_shift = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, y: Tensor, frozen: Any = None) -> Tensor:
        return scale_shift(y, self.scale, None)

    def fused_linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        if not (torch.is_grad_enabled() and self.scale.requires_grad and is_fusable(x, w)):
            return None
        return linear_scale_shift(x, w, b, self.scale, None)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.to(w.dtype)
        return w * scale[:, None], None if b is None else b * scale


@register
class IA3(Method):
    """Learned factors on keys, values and the feed-forward's activations.

    preset: "paper" (k, v, FFN) or "qkv" (q, k, v: another method under the same name in blogs).
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-2, min_steps=200)

    preset: Literal["paper", "qkv"] = "paper"
    default_targets: ClassVar[str] = PRESETS["paper"]

    def sites(self, survey: Any) -> list[Site]:
        return select(survey.sites, self.targets or PRESETS[self.preset], self.layers)

    def why_not_at_weight(self, site: Site) -> str:
        return ""

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        return ScaleDelta(site.d_out)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return sum(s.d_out for s in sites)
