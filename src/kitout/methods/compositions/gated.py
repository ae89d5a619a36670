"""Gated: every adapter with a gate of its own at every module, which its input opens.

After UniPELT (Mao et al. 2021, arXiv 2110.07577; code morningmoni/UniPELT), for adapters of any method: y' = y + sum_i
g_i (f_i(x) - y), g_i = sigmoid(w_i x + b_i). In stacks where every position sees all others, g_i is averaged over the
real positions of a row, or of a window of it (UniPELT averages padding too). Where a position sees those before it
alone, or a module is given positions of several rows, each position has its own gate: an average would show it what
comes after, and change while a cache grows. It knows values of parts, and neither their methods nor how real positions
are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta
from kitout.errors import RouteError
from kitout.method import TrainingDefaults, register
from kitout.methods.compositions.combined import CombinedParts, CombiningDelta, whole_modules

INIT_STD = 0.02


class GatedDelta(CombiningDelta):
    """y + sum_i g_i (values_i - y). reads_output: the gates read y, where x is no vector (token ids)."""

    averages_positions = True

    def __init__(self, d: int, parts: int, reads_output: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(parts, d)), nn.Parameter(torch.zeros(parts))
        self.reads_output = reads_output
        nn.init.normal_(self.weight, std=INIT_STD)

    def part_weights(self, x: Tensor, y: Tensor, values: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        gates = F.linear((y if self.reads_output else x).to(y.dtype), self.weight.to(y.dtype), self.bias.to(y.dtype))
        gates = gates.sigmoid()
        if real is None:
            return gates
        axes, weight = tuple(range(1, real.ndim)), real.unsqueeze(-1)
        return (gates * weight).sum(axes, keepdim=True) / weight.sum(axes, keepdim=True).clamp_min(1)

    def combine(self, x: Tensor, y: Tensor, values: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        new = y
        for gate, value in zip(self.part_weights(x, y, values, real).unbind(-1), values, strict=True):
            new = new if value is y else new + gate.unsqueeze(-1) * (value - y)
        return new


@register
class Gated(CombinedParts):
    """Other adapters, each with a gate at every module that the module's input opens."""

    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-3)
    mergeable: ClassVar[bool] = False
    limitations: ClassVar[str] = "adapters without virtual tokens that act on values"

    def sites_over_parts(self, survey: Survey, parts: Mapping[str, Sequence[Site]]) -> list[Site]:
        sites = [(name, site) for name, of_part in parts.items() for site in of_part]
        without = [(name, site) for name, site in sites if site.port in ("param", "weight") or not site.d_in]
        if without:
            listed = ", ".join(f"{site.path} ({name})" for name, site in without[:4])
            raise RouteError(f"Gated weighs values, and these change parameters or are heads: {listed}; use Mixture")
        return whole_modules(survey, parts, reads_input=True)

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        reads_output = site.kind == "embedding" or site.channels_first
        return GatedDelta(site.d_out if reads_output else site.d_in, len(self.of), reads_output)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        widths = (s.d_out if s.kind == "embedding" or s.channels_first else s.d_in for s in sites)
        return sum(len(self.of) * (width + 1) for width in widths)
