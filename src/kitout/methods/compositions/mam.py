"""MAM (mix-and-match): a prefix at every attention and a parallel adapter at every feed-forward, as one adapter.

He et al. 2021 (arXiv 2110.04366), section 4.7; code jxhe/unify-parameter-efficient-tuning: attention gets the small
change (a prefix of 30), the feed-forward the large one (width 512, scale 4). It starts as the prefix alone, because the
parallel adapter starts as the identity. It is made of those two methods, and knows nothing of where they sit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator
from torch import nn

from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta
from kitout.method import Method, TrainingDefaults, register
from kitout.methods.deltas.bottleneck import BottleneckScale
from kitout.methods.parallel_adapter import ParallelAdapter
from kitout.methods.prefix_tuning import PrefixTuning


@register
class MAM(Method):
    """A prefix at every attention and a parallel adapter at every feed-forward.

    prefix: length of the prefix. width, scale: of the parallel adapter.
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults(3e-5, weight_decay=0.01)
    mergeable: ClassVar[bool] = False
    starts_as_identity: ClassVar[bool] = False
    default_location: ClassVar[str] = "every attention call, sub.mlp"
    limitations: ClassVar[str] = "strength and Mix are weights of attention too, not below 0"

    prefix: int = Field(default=30, ge=1)
    width: int = Field(default=512, ge=1)
    scale: BottleneckScale = 4.0

    @model_validator(mode="after")
    def _check_targets(self) -> MAM:
        if self.targets is not None:
            raise ValueError("targets: its two places are fixed; use PrefixTuning and ParallelAdapter in a Stack")
        return self

    def _methods(self) -> tuple[PrefixTuning, ParallelAdapter]:
        return (
            PrefixTuning(length=self.prefix, layers=self.layers),
            ParallelAdapter(width=self.width, scale=self.scale, layers=self.layers),
        )

    def sites(self, survey: Survey) -> list[Site]:
        return [site for method in self._methods() for site in method.sites(survey)]

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        prefix, adapter = self._methods()
        return (prefix if site.port == "kv" else adapter).build(site, shared)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        prefix, adapter = self._methods()
        of_prefix = [site for site in sites if site.port == "kv"]
        return prefix.num_parameters(of_prefix) + adapter.num_parameters([s for s in sites if s.port != "kv"])
