"""Houlsby's serial adapters: a bottleneck at the end of every sublayer, and the norms trained too.

Houlsby et al. 2019 (arXiv 1902.00751), figure 2; code google-research/adapter-bert (modeling.py: feedforward_adapter,
and its collection of all layer norms): y' = y + up(gelu(down y)) on what a sublayer adds to the residual stream, before
the sum. Weights start as truncated normal of std 1e-3 (the paper says 1e-2), biases at 0: near the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.base.weights import bias
from kitout.delta import Delta
from kitout.method import Method, TrainingDefaults, register
from kitout.methods.deltas.affine import ScaleShift
from kitout.methods.deltas.bottleneck import Activation, Bottleneck, bottleneck_size, default_sites


@register
class Houlsby(Method):
    """Two serial adapters per block (three with cross-attention), on the values the sublayers end with.

    A norm between projection and sum belongs to its sublayer, so the adapter comes after it. width: of the bottleneck.
    norms: every norm's gain and, where it has one, its shift are trained too, as factor and offset on its output.
    activation: of the bottleneck. std: of the initial weights.
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-3)
    mergeable: ClassVar[bool] = False
    starts_as_identity: ClassVar[bool] = False
    default_targets: ClassVar[str] = "sub.*"
    default_location: ClassVar[str] = "end of every sublayer; norms"

    width: int = Field(default=64, ge=1)
    norms: bool = True
    activation: Activation = "gelu"
    std: float = Field(default=1e-3, gt=0.0)

    def sites(self, survey: Survey) -> list[Site]:
        sites = default_sites(self, survey, ("sub.attn", "sub.mlp"))
        if self.norms and any(s.role == "norm" for s in survey.sites):
            sites = select(survey.sites, f"{self.targets or self.default_targets} norm", self.layers)
        return [s.replace(input_from=None) for s in sites]  # reads what it changes, not the stream

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        if self.norms and site.role == "norm":
            return ScaleShift(site.d_out, has_shift=bias(site.module) is not None)
        return Bottleneck(site.d_out, self.width, activation=self.activation, init="truncated", std=self.std)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        norms = [s for s in sites if self.norms and s.role == "norm"]
        gains = sum(s.d_out * (1 + (bias(s.module) is not None)) for s in norms)
        return gains + sum(bottleneck_size(s.d_out, self.width) for s in sites if s not in norms)
