"""LoRA and its variants: rsLoRA's scale, DoRA's magnitude, PiSSA's initialization; rank and alpha also by role.

Hu et al. 2021 (arXiv 2106.09685), code microsoft/LoRA; Kalajdzievski 2023 (rsLoRA, arXiv 2312.03732: alpha / sqrt r);
Meng et al. 2024 (PiSSA, arXiv 2404.02948). A ~ kaiming_uniform(a = sqrt 5), B = 0; an embedding's A = 0, B ~ N(0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from kitout.base.select import matches
from kitout.base.site import Site
from kitout.base.weights import fan_in, is_matrix_product, weight_matrix
from kitout.delta import Delta
from kitout.errors import ConfigError, TargetError
from kitout.method import Method, TrainingDefaults, register
from kitout.methods.deltas.dora import DoRADelta
from kitout.methods.deltas.low_rank import LowRankDelta

ByRole = dict[str, int]


@register
class LoRA(Method):
    """A low-rank change of selected projections: y' = y + alpha / rank * B A dropout(x).

    rank, alpha: a number, or numbers by role as in {"attn.*": 8, "mlp.*": 16}. alpha None = 2 * rank. dropout: on x.
    rslora: alpha / sqrt rank. dora: renormalize to a learned magnitude. init: "default", or "pissa" (A and B start as
    the principal directions of W, whose product is subtracted again, so a new adapter is the identity).
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-3, weight_decay=0.01)
    default_targets: ClassVar[str] = "attn.q attn.v"

    rank: int | ByRole = 8
    alpha: float | dict[str, float] | None = None
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "pissa"] = "default"

    @field_validator("rank")
    @classmethod
    def _check_rank(cls, rank: int | ByRole) -> int | ByRole:
        for r in rank.values() if isinstance(rank, dict) else [rank]:
            if r <= 0:
                raise ValueError(f"rank must be at least 1, found {r}")
        return rank

    @field_validator("alpha")
    @classmethod
    def _check_alpha(cls, alpha: float | dict[str, float] | None) -> float | dict[str, float] | None:
        for a in alpha.values() if isinstance(alpha, dict) else [1.0 if alpha is None else alpha]:
            if a <= 0:
                raise ValueError(f"alpha must be above 0, found {a}")
        return alpha

    @model_validator(mode="after")
    def _check_init(self) -> LoRA:
        if self.dora and self.init == "pissa":
            raise ValueError(
                "dora=True starts from the whole weight and pissa from its principal directions: choose one"
            )
        return self

    def _check_site(self, site: Site) -> None:
        if site.role.startswith("sub.") or site.role == "block":
            raise TargetError(f"LoRA over {site.role} ({site.path}): it changes a projection; write mlp.down or attn.o")
        if site.kind == "other" and not is_matrix_product(site.module):
            raise TargetError(
                f"LoRA over {site.path}: a {type(site.module).__name__} does more than multiply by its weight, so a "
                "low-rank change of its output is none of its weight; choose other targets, or train its parameters: "
                f"PartialFineTuning(names={site.path + '.*'!r})"
            )
        if site.port == "in" and (self.dora or self.init == "pissa"):
            raise ConfigError(
                f"dora and pissa read the weight behind an output, and {site.path} is adapted at its input"
            )

    def why_not_at_weight(self, site: Site) -> str:
        return "dropout acts on an input: set dropout=0" if self.dropout else ""

    def rank_at(self, site: Site) -> int:
        rank = value_for_role(self.rank, site, "rank")
        max_rank = min(fan_in(site), site.d_out)
        if rank > max_rank:
            raise ConfigError(f"rank {rank} is more than {site.path} can hold: at most {max_rank} ({site.role})")
        return int(rank)

    def scale_at(self, site: Site) -> float:
        rank = self.rank_at(site)
        alpha = 2.0 * rank if self.alpha is None else value_for_role(self.alpha, site, "alpha")
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        self._check_site(site)
        rank, width = self.rank_at(site), fan_in(site)
        scale = self.scale_at(site)
        a, b = init_factors(site, rank, width)
        if self.init == "pissa":
            a, b = pissa_factors(frozen_weight(site), rank, scale)
        if self.dora:
            return DoRADelta(a, b, frozen_weight(site).norm(dim=1), scale, self.dropout)
        delta = LowRankDelta(a, b, scale, self.dropout, uses_module_map=site.kind != "linear")
        if self.init == "pissa":
            delta.subtract_start(a, b)
        return delta

    def num_parameters(self, sites: Sequence[Site]) -> int:
        pairs = sum(self.rank_at(s) * (fan_in(s) + s.d_out) for s in sites)
        return pairs + (sum(s.d_out for s in sites) if self.dora else 0)


def value_for_role(value: float | dict[str, int] | dict[str, float], site: Site, description: str) -> float:
    """A setting that may be given by role; the last pattern that matches wins."""
    if not isinstance(value, dict):
        return value
    matching = [v for pattern, v in value.items() if matches(site, pattern)]
    if not matching:
        raise ConfigError(f"{description} {value} has no value for {site.path} ({site.role}): add {site.role!r} or '*'")
    return matching[-1]


def init_factors(site: Site, rank: int, width: int) -> tuple[Tensor, Tensor]:
    """A and B whose product is zero."""
    if isinstance(site.module, nn.Embedding):
        return torch.zeros(rank, width), torch.randn(site.d_out, rank)
    a = torch.empty(rank, width)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, torch.zeros(site.d_out, rank)


def frozen_weight(site: Site) -> Tensor:
    """The site's rows of the frozen weight in fp32."""
    w = weight_matrix(site.module, site.weight_name).detach().float()
    return w if site.channel_index is None else w[site.channel_index]


def pissa_factors(w: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A, B with scale * B A = the rank-r truncation of w."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
