"""Partial fine-tuning as an adapter: the last blocks, the head, the norms, or parameters by name.

Jia et al. 2022 (VPT, arXiv 2203.12119), section 4.1; code KMnP/vpt (src/models/vit_models.py): "partial-k" is the last
k blocks and the final norm, k (12 d^2 + 13 d) + 2 d values in a vision transformer; "linear" is the head. It knows
nothing of how copies are worn (`copies.py`).
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
from kitout.errors import Faults, TargetError, suggest
from kitout.method import Method, Rate, register
from kitout.methods.deltas.trained_copy import Copy, Ties, size


@register
class PartialFineTuning(Method):
    """The last blocks and the final norm, the head, the norms, or parameters by name: exactly one of these settings.

    last: how many blocks, counted back from the end of each tower (the stages of a pyramid are one). part: "head" or
    "norms". names: globs over parameter names, as in "*.bias layers.11.*".
    """

    seat: ClassVar[str] = "as last, part or names says"
    note: ClassVar[str] = "rows of one batch share class and position tokens"
    rate: ClassVar[Rate] = Rate(3e-4, decay=0.01)

    last: int | None = Field(default=None, ge=1)
    part: Literal["head", "norms"] | None = None
    names: str | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> PartialFineTuning:
        given = [f for f in ("last", "part", "names") if getattr(self, f) is not None]
        if len(given) != 1:
            said = ", ".join(f"{f}={getattr(self, f)!r}" for f in given) or "nothing"
            raise ValueError(f"give exactly one of last=k, part='head' or 'norms', names='*.bias'; found {said}")
        if self.names is not None and not self.names.split():
            raise ValueError(f"names={self.names!r} is empty: write globs over parameter names, such as '*.bias'")
        if self.targets is not None or self.layers != "all":
            told = f"targets={self.targets!r}, layers={self.layers!r}"
            raise ValueError(
                f"{told}: last, part and names say where; FullFineTuning(targets=..., layers=...) takes these"
            )
        return self

    def advised(self) -> Rate:
        """A head alone is trained at a head's rate, 3e-3."""
        return Rate(self.rate.head) if self.part == "head" else self.rate

    def sites(self, survey: Survey) -> list[Site]:
        every = parameter_sites(survey, fixed=self.names is not None)
        if self.names is not None:
            return _named(every, self.names.split())
        if self.part is not None:
            role = "norm" if self.part == "norms" else "head"
            found = [s for s in every if s.role == role]
            if not found:
                raise TargetError(f"part={self.part!r}: this model has no {role} with parameters")
            return found
        assert self.last is not None
        chosen = survey.last_blocks(self.last)
        final = {s.path for s in survey.sites if s.role == "norm" and survey.ends_tower(s)}
        return [s for s in every if (s.tower, s.layer) in chosen or s.path in final]

    def common(self, sites: Sequence[Site]) -> nn.Module:
        return Ties()

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        assert isinstance(shared, Ties)
        return Copy(site, shared)

    def count(self, sites: Sequence[Site]) -> int:
        return size(sites)


def _named(every: Sequence[Site], globs: Sequence[str]) -> list[Site]:
    """The sites with only those parameters whose full names match."""
    faults = Faults(TargetError, f"names={' '.join(globs)!r}")
    full = {(s.path, n): f"{s.path}.{n}" if s.path else n for s in every for n in s.names}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in full.values()):
            faults.add(f"{glob!r} matches no parameter; {suggest(glob, full.values())}")
    faults.raise_if_any()
    found = []
    for site in every:
        kept = [i for i, n in enumerate(site.names) if any(fnmatchcase(full[site.path, n], g) for g in globs)]
        if kept:
            pick = {"names": tuple(site.names[i] for i in kept), "keys": tuple(site.keys[i] for i in kept)}
            found.append(site.at(**pick))
    return found
