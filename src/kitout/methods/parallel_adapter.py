"""The scaled parallel adapter: a bottleneck beside a sublayer, from the residual stream back into it.

He et al. 2021 (arXiv 2110.04366), table 1 and section 4.6; code jxhe/unify-parameter-efficient-tuning
(petl/petl_factory.py: Adapter_Layer): y' = y + s * up(relu(down x)), x the stream before the sublayer's norm (in
post-norm blocks the sublayer's input itself). s = 4 or learned from 1; LoRA's start: the identity.
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
from kitout.methods.deltas.bottleneck import Activation, Bottleneck, BottleneckScale, bottleneck_size, default_sites


@register
class ParallelAdapter(Method):
    """One parallel adapter per feed-forward (targets="sub.*": beside attention too).

    width: of the bottleneck. scale: a number or "learned". dropout: between activation and up-projection.
    activation: of the bottleneck.
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults(3e-5, weight_decay=0.01)  # x, not normed, may be large
    mergeable: ClassVar[bool] = False
    default_targets: ClassVar[str] = "sub.mlp"

    width: int = Field(default=512, ge=1)
    scale: BottleneckScale = 4.0
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    activation: Activation = "relu"

    def sites(self, survey: Survey) -> list[Site]:
        return default_sites(self, survey, ("sub.mlp",))

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        return Bottleneck(
            site.d_out,
            self.width,
            reads="x",
            activation=self.activation,
            scale=self.scale,
            dropout=self.dropout,
        )

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return sum(bottleneck_size(s.d_out, self.width, self.scale) for s in sites)
