"""SSF: scale and shift after every operation of the backbone.

Lian et al. 2022 (arXiv 2210.08823), eq. 3; code dongzelian/SSF (models/vision_transformer.py): y' = s * y + t after the
patch embedding, every norm (the final one too), q, k, v, the attention's output and both feed-forward projections; not
after softmax, activation, residual sum or LayerScale, not on heads. s ~ N(1, .02), t ~ N(0, .02): not the identity.
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
from kitout.methods.deltas.affine import ScaleShift

KINDS = ("linear", "conv", "norm")


@register
class SSF(Method):
    """y' = scale * y + shift at every linear, convolution and norm up to the last block, and at the final norm.

    std: of the initial values around the identity (0.02 in the paper). targets: only these. Poolers and heads are not
    adapted.
    """

    default_location: ClassVar[str] = "every linear, convolution and norm"
    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-3, min_steps=200)
    starts_as_identity: ClassVar[bool] = False

    std: float = Field(default=0.02, ge=0.0)

    def sites(self, survey: Survey) -> list[Site]:
        if self.targets is not None:
            return select(survey.sites, self.targets, self.layers)
        candidates = [s for s in select(survey.sites, "*", self.layers) if s.kind in KINDS and s.role != "head"]
        return [s for s in candidates if s.kind == "norm" or not survey.runs_after_blocks(s)]

    def why_not_at_weight(self, site: Site) -> str:
        return "" if site.bias_name else "no bias is read with it"

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        return ScaleShift(site.d_out, self.std)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return sum(2 * s.d_out for s in sites)
