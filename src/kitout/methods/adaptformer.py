"""AdaptFormer: a small parallel bottleneck beside every feed-forward of a vision transformer.

Chen et al. 2022 (arXiv 2205.13535), eq. 4 and 5; code ShoufaChen/AdaptFormer (models/adapter.py): y' = y + s * up(
dropout(relu(down x))), x the residual stream before the norm, outside drop-path. s = 0.1 or learned from 1, width 64,
dropout 0.1; LoRA's start: the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn

from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta
from kitout.method import Method, TrainingDefaults, register
from kitout.methods.deltas.bottleneck import Bottleneck, BottleneckScale, bottleneck_size, default_sites


@register
class AdaptFormer(Method):
    """One parallel adapter per feed-forward, scaled down.

    width: of the bottleneck. scale: a number or "learned". dropout: between activation and up-projection.
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults(3e-3)
    mergeable: ClassVar[bool] = False
    default_targets: ClassVar[str] = "sub.mlp"

    width: int = Field(default=64, ge=1)
    scale: BottleneckScale = 0.1
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)

    def sites(self, survey: Survey) -> list[Site]:
        return default_sites(self, survey, ("sub.mlp",))

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        return Bottleneck(site.d_out, self.width, reads="x", scale=self.scale, dropout=self.dropout)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return sum(bottleneck_size(s.d_out, self.width, self.scale) for s in sites)
