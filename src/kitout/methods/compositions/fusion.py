"""Fusion: attention over what other adapters add, at every place and position where all of them act on an output.

AdapterFusion (Pfeiffer et al. 2020, arXiv 2005.00247; code Adapter-Hub/adapters), for adapters of any method: a_i =
f_i(x) - f(x), q = W_q f(x) + b, k_i = W_k a_i, p = softmax_i(dropout(q k_i)), y' = y + sum_i p_i W_v a_i. W_q and W_k
start at N(0, 0.02), W_v at the identity, from which a penalty keeps it: penalty * |I - W_v|^2. The paper's bias on the
keys is left out: it adds the same to every score of a position, which the softmax takes off again. It knows values of
parts, and neither their methods nor how a penalty joins a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta
from kitout.errors import RouteError
from kitout.method import TrainingDefaults, register
from kitout.methods.compositions.combined import CombinedParts, CombiningDelta, in_model_order

INIT_STD = 0.02


class FusionDelta(CombiningDelta):
    """y + sum_i p_i W_v (values_i - y)."""

    def __init__(self, d: int, dropout: float, penalty: float) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.empty(d, d)), nn.Parameter(torch.empty(d, d))
        self.query_bias, self.value = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.eye(d))
        self.dropout, self.penalty_factor = dropout, penalty
        for weight in (self.query, self.key):
            nn.init.normal_(weight, std=INIT_STD)

    def part_weights(self, x: Tensor, y: Tensor, values: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        return self._attend(y, torch.stack([value - y for value in values], -2))

    def _attend(self, y: Tensor, changes: Tensor) -> Tensor:
        """y [..., d], changes [..., parts, d] -> [..., parts]."""
        query = F.linear(y, self.query.to(y.dtype), self.query_bias.to(y.dtype))
        query = query @ self.key.to(y.dtype)  # q (W_k a_i) = (q W_k) a_i: one product instead of one per part
        scores = (changes @ query.unsqueeze(-1)).squeeze(-1)
        return F.dropout(scores, self.dropout, self.training).float().softmax(-1).to(y.dtype)

    def combine(self, x: Tensor, y: Tensor, values: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        changes = torch.stack([value - y for value in values], -2)
        mixed = (self._attend(y, changes).unsqueeze(-2) @ changes).squeeze(-2)
        return y + F.linear(mixed, self.value.to(y.dtype))

    def penalty(self) -> Tensor | None:
        if not self.penalty_factor:
            return None
        difference = self.value - torch.eye(len(self.value), dtype=self.value.dtype, device=self.value.device)
        return self.penalty_factor * difference.square().sum()


@register
class Fusion(CombinedParts):
    """Attention over what other adapters add, where all of them act on an output.

    dropout: on the scores of attention. penalty: factor of |I - W_v|^2 in the loss, W_v being the map of the values.
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults(5e-5)
    mergeable: ClassVar[bool] = False
    default_location: ClassVar[str] = "where all its adapters are"
    limitations: ClassVar[str] = "adapters without virtual tokens"

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    penalty: float = Field(default=0.01, ge=0.0)

    def sites_over_parts(self, survey: Survey, parts: Mapping[str, Sequence[Site]]) -> list[Site]:
        outputs = [
            {(s.path, s.channels): s for s in sites if s.port in ("out", "parts") and s.reader is None and s.d_out}
            for sites in parts.values()
        ]
        common = [site for place, site in outputs[0].items() if all(place in other for other in outputs)]
        if not common:
            where = "; ".join(
                f"{name} acts on {', '.join(dict.fromkeys(s.role for s in found.values())) or 'no output'}"
                for name, found in zip(parts, outputs, strict=True)
            )
            raise RouteError(f"Fusion needs a place where all of {', '.join(parts)} act on an output: {where}")
        return in_model_order(survey, (s.replace(port="parts", input_from=None) for s in common))

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        return FusionDelta(site.d_out, self.dropout, self.penalty)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return sum(3 * s.d_out**2 + s.d_out for s in sites)
