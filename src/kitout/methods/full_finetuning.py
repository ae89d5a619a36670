"""Full fine-tuning as an adapter: every parameter the model reads has a trained copy; the base stays as it is.

Exactly ordinary fine-tuning (same function, same gradients), but activated, switched, mixed, routed by row, merged and
saved (as a difference) like any other adapter. Rows of one batch cannot each have their own class or position tokens.
It knows nothing of how copies become active (`deltas/trained_copy.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from kitout.base.find.parameters import parameter_sites
from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta
from kitout.errors import ConfigError
from kitout.method import Method, TrainingDefaults, register
from kitout.methods.deltas.trained_copy import TiedCopies, TrainedCopy, num_copied_values


@register
class FullFineTuning(Method):
    """Every parameter, heads and token tables included; with targets or layers, those of the chosen modules only."""

    default_location: ClassVar[str] = "every parameter"
    limitations: ClassVar[str] = "rows of one batch share class and position tokens"
    training: ClassVar[TrainingDefaults] = TrainingDefaults(3e-5, weight_decay=0.01)

    def sites(self, survey: Survey) -> list[Site]:
        if self.targets is not None and any(word.startswith("in:") for word in self.targets.split()):
            raise ConfigError(f"targets={self.targets!r}: fine-tuning takes modules, and an input has no parameters")
        return select(parameter_sites(survey), self.targets or "*", self.layers)

    def build_shared(self, sites: Sequence[Site]) -> nn.Module:
        return TiedCopies()

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        assert isinstance(shared, TiedCopies)
        return TrainedCopy(site, shared)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return num_copied_values(sites)
