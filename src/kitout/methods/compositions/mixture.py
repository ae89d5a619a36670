"""Mixture: a Mix whose weights are trained, for the whole model, by layer or by module; the adapters stay frozen.

y' = y + sum_i w_i (f_i(x) - y), as a Mix. Per layer this is the concatenation of LoRA Soups (Prabhakar et al. 2024,
arXiv 2410.13025: CAT), here for adapters of any method; with softmax the weights stay positive and sum to 1. It starts
as the Mix with its initial weights, and merges as one. It knows its weights, and neither its parts' methods nor how
their products are joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta
from kitout.method import TrainingDefaults, register
from kitout.methods.compositions.combined import CombinedParts, CombiningDelta, whole_modules


class MixtureDelta(CombiningDelta):
    """y + sum_i w_i (values_i - y); w is its own, or one of those that the adapter holds for several sites."""

    def __init__(self, weights: nn.ParameterDict, group: str, softmax: bool, owns_weights: bool) -> None:
        super().__init__()
        self.own = weights if owns_weights else None
        # In a tuple, which registers nothing: the weights are not always this Delta's.
        self._weights_and_group = (weights, group)
        self.softmax = softmax

    def mixing_weights(self) -> Tensor:
        weights, group = self._weights_and_group
        return weights[group].softmax(0) if self.softmax else weights[group]

    def part_weights(self, x: Tensor, y: Tensor, values: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        return self.mixing_weights()

    def combine(self, x: Tensor, y: Tensor, values: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        new = y
        for weight, value in zip(self.mixing_weights().unbind(), values, strict=True):
            new = new if value is y else new + weight * (value - y)
        return new


@register
class Mixture(CombinedParts):
    """A Mix of other adapters with trained weights.

    per: what has weights of its own, "model" (one set), "layer" or "site" (every module). init: the weights at first,
    one for each adapter; None = 1/n each. softmax: the weights are positive and sum to 1.
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-2)
    limitations: ClassVar[str] = "adapters without virtual tokens"

    per: Literal["model", "layer", "site"] = "model"
    init: tuple[float, ...] | None = None
    softmax: bool = False

    @model_validator(mode="after")
    def _check_init(self) -> Mixture:
        if self.init is None:
            return self
        if len(self.init) != len(self.of):
            raise ValueError(f"init has {len(self.init)} weights for {len(self.of)} adapters")
        if self.softmax and (min(self.init) <= 0 or abs(fsum(self.init) - 1) > 1e-6):
            raise ValueError("with softmax, the weights of init are positive and sum to 1")
        return self

    def sites_over_parts(self, survey: Survey, parts: Mapping[str, Sequence[Site]]) -> list[Site]:
        return whole_modules(survey, parts)

    def _group(self, site: Site) -> str:
        """What a site shares its weights with."""
        if self.per != "layer":
            return self.per
        return "outside" if site.layer is None else f"{site.tower}/{site.layer}".replace(".", "/")

    def _weights(self, groups: Iterable[str]) -> nn.ParameterDict:
        init = torch.tensor(self.init or (1 / max(1, len(self.of)),) * len(self.of))
        return nn.ParameterDict({g: nn.Parameter(init.log() if self.softmax else init.clone()) for g in groups})

    def build_shared(self, sites: Sequence[Site]) -> nn.Module | None:
        return None if self.per == "site" else self._weights(dict.fromkeys(map(self._group, sites)))

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        group = self._group(site)
        if isinstance(shared, nn.ParameterDict):
            return MixtureDelta(shared, group, self.softmax, owns_weights=False)
        return MixtureDelta(self._weights([group]), group, self.softmax, owns_weights=True)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        groups = len(sites) if self.per == "site" else len({self._group(site) for site in sites})
        return len(self.of) * groups
