"""Partial fine-tuning as an adapter: the last blocks, the head, the norms, or parameters by name.

Jia et al. 2022 (VPT, arXiv 2203.12119), section 4.1; code KMnP/vpt (src/models/vit_models.py): "partial-k" is the last
k blocks and the final norm, k (12 d^2 + 13 d) + 2 d values in a vision transformer; "linear" is the head. It knows
nothing of how copies become active (`deltas/trained_copy.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from kitout.base.find.parameters import parameter_sites
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta
from kitout.errors import Errors, TargetError, suggest
from kitout.method import Method, TrainingDefaults, register
from kitout.methods.deltas.trained_copy import TiedCopies, TrainedCopy, num_copied_values


@register
class PartialFineTuning(Method):
    """The last blocks and the final norm, the head, the norms, or parameters by name: exactly one of these settings.

    last: how many blocks, counted back from the end of each tower (the stages of a pyramid are one). part: "head" or
    "norms". names: globs over parameter names, as in "*.bias layers.11.*".
    """

    default_location: ClassVar[str] = "chosen by last, part or names"
    limitations: ClassVar[str] = "rows of one batch share class and position tokens"
    training: ClassVar[TrainingDefaults] = TrainingDefaults(3e-4, weight_decay=0.01)

    last: int | None = Field(default=None, ge=1)
    part: Literal["head", "norms"] | None = None
    names: str | None = None

    @model_validator(mode="after")
    def _check_one_choice(self) -> PartialFineTuning:
        choices = [f"{f}={getattr(self, f)!r}" for f in ("last", "part", "names") if getattr(self, f) is not None]
        if len(choices) != 1:
            found = ", ".join(choices) or "nothing"
            raise ValueError(f"give exactly one of last=k, part='head' or 'norms', names='*.bias'; found {found}")
        if self.names is not None and not self.names.split():
            raise ValueError(f"names={self.names!r} is empty: write globs over parameter names, such as '*.bias'")
        if self.targets is not None or self.layers != "all":
            raise ValueError(
                f"targets={self.targets!r}, layers={self.layers!r}: last, part and names say where; "
                "FullFineTuning(targets=..., layers=...) takes these"
            )
        return self

    def training_defaults(self) -> TrainingDefaults:
        """A head alone is trained with the learning rate of a head, 3e-3."""
        return TrainingDefaults(self.training.head_lr) if self.part == "head" else self.training

    def sites(self, survey: Survey) -> list[Site]:
        all_sites = parameter_sites(survey, include_non_trainable=self.names is not None)
        if self.names is not None:
            return _sites_by_name(all_sites, self.names.split())
        if self.part is not None:
            role = "norm" if self.part == "norms" else "head"
            sites = [s for s in all_sites if s.role == role]
            if not sites:
                raise TargetError(f"part={self.part!r}: this model has no {role} with parameters")
            return sites
        assert self.last is not None
        last_blocks = survey.last_blocks(self.last)
        final_norms = {s.path for s in survey.sites if s.role == "norm" and survey.closes_tower(s)}
        return [s for s in all_sites if (s.tower, s.layer) in last_blocks or s.path in final_norms]

    def build_shared(self, sites: Sequence[Site]) -> nn.Module:
        return TiedCopies()

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        assert isinstance(shared, TiedCopies)
        return TrainedCopy(site, shared)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return num_copied_values(sites)


def _sites_by_name(sites: Sequence[Site], globs: Sequence[str]) -> list[Site]:
    """The sites with only those parameters whose full names match."""
    errors = Errors(TargetError, f"names={' '.join(globs)!r}")
    full_names = {(s.path, n): f"{s.path}.{n}" if s.path else n for s in sites for n in s.parameter_names}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in full_names.values()):
            errors.add(f"{glob!r} matches no parameter; {suggest(glob, full_names.values())}")
    errors.raise_if_any()
    selected = []
    for site in sites:
        names = [full_names[site.path, n] for n in site.parameter_names]
        matching = [i for i, name in enumerate(names) if any(fnmatchcase(name, glob) for glob in globs)]
        if matching:
            parameter_names = tuple(site.parameter_names[i] for i in matching)
            tied_keys = tuple(site.tied_keys[i] for i in matching)
            selected.append(site.replace(parameter_names=parameter_names, tied_keys=tied_keys))
    return selected
