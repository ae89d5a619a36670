"""Pfeiffer's serial adapter: one bottleneck per block, after the feed-forward.

Pfeiffer et al. 2020 (AdapterFusion, arXiv 2005.00247; code adapter-hub/adapters, config "seq_bn"). Post-norm blocks:
y = LN(up(relu(down(LN(h + x)))) + h + x), with h the feed-forward's value, x the residual and LN the block's own frozen
norm. Blocks whose stream carries the sum on: z + up(relu(down z)), z the block's output. Start N(0, .01), biases 0
(the code: .02, which trains worse: docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta
from kitout.method import Method, TrainingDefaults, register
from kitout.methods.deltas.bottleneck import Activation, Bottleneck, bottleneck_size


@register
class Pfeiffer(Method):
    """One serial adapter per block. Which form a block needs is seen in its forward, not in its name.

    width: of the bottleneck. activation: of the bottleneck. std: of the initial weights.
    """

    default_location: ClassVar[str] = "end of every block"
    training: ClassVar[TrainingDefaults] = TrainingDefaults(3e-4)
    mergeable: ClassVar[bool] = False
    starts_as_identity: ClassVar[bool] = False

    width: int = Field(default=48, ge=1)
    activation: Activation = "relu"
    std: float = Field(default=0.01, gt=0.0)

    def sites(self, survey: Survey) -> list[Site]:
        if self.targets is not None:
            return select(survey.sites, self.targets, self.layers)
        blocks = select(survey.sites, "block", self.layers)
        post_norm = {(s.tower, s.layer): s for s in survey.sites if s.role == "sub.mlp" and s.post_norm is not None}
        return [post_norm.get((b.tower, b.layer), b) for b in blocks]

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        return Bottleneck(
            site.d_out,
            self.width,
            reads="y" if site.post_norm is None else "norm",
            activation=self.activation,
            init="normal",
            std=self.std,
        )

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return sum(bottleneck_size(s.d_out, self.width) for s in sites)
