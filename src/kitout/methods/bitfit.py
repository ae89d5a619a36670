"""BitFit: only the biases are trained.

Ben Zaken et al. 2021 (arXiv 2106.10199), code benzakenelad/BitFit: every bias of the model (projections, norms,
pooler), except heads. Held as the difference from the frozen bias, so a new one is the identity. A model without any
bias gets zero-initialized ones on every linear and norm inside its blocks (as r-three/t-few does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.weights import bias
from kitout.delta import Delta
from kitout.method import Method, TrainingDefaults, register
from kitout.methods.deltas.shifted import BIASED_KINDS, ShiftDelta


@register
class BitFit(Method):
    """The biases that exist; on a model without any, new ones on every block linear and norm.

    everywhere: new ones also where a partly biased model has none. targets: only these (new biases where missing).
    """

    default_location: ClassVar[str] = "every bias"
    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-3, min_steps=200)

    everywhere: bool = False

    def sites(self, survey: Any) -> list[Site]:
        if self.targets is not None:
            return select(survey.sites, self.targets, self.layers)
        selected = select(survey.sites, "*", self.layers)
        candidates = [s for s in selected if s.kind in BIASED_KINDS and s.role != "head" and s.channels is None]
        biased = [s for s in candidates if bias(s.module, s.bias_name) is not None]
        if biased and not self.everywhere:
            return biased
        return [s for s in candidates if s.layer is not None or s in biased]

    def why_not_at_weight(self, site: Site) -> str:
        return "" if site.bias_name else "no bias is read with it"

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        return ShiftDelta(site.d_out)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return sum(s.d_out for s in sites)
