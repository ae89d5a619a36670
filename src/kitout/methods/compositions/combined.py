"""What compositions share: no targets of their own; the learned ones: their parts, and the modules that parts act on.

A part sees the frozen module and none of the others, so what a composition combines is one value per part at each
module. It knows sites, and nothing of how a composition weighs its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from pydantic import field_validator, model_validator
from torch import Tensor

from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.base.weights import FrozenModule
from kitout.delta import Delta
from kitout.errors import RouteError
from kitout.method import Method


class CombiningDelta(Delta):
    """A Delta at the port "parts"."""

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        """y: without what its parts make of it, there is nothing to combine."""
        return y


class MadeOfAdapters(Method):
    """A method that is made of other adapters of its kit."""

    starts_as_identity: ClassVar[bool] = False
    default_location: ClassVar[str] = "where its adapters are"

    @model_validator(mode="after")
    def _check_no_targets(self) -> MadeOfAdapters:
        if self.targets is not None or self.layers != "all":
            raise ValueError("its adapters say where they are: it takes neither targets nor layers")
        return self


class CombinedParts(MadeOfAdapters):
    """A composition with values of its own.

    of: the adapters that it is made of, by their names on the kit.
    """

    parts_may_have_tokens: ClassVar[bool] = False

    of: tuple[str, ...] = ()

    @field_validator("of")
    @classmethod
    def _check_unique(cls, of: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(of)) < len(of):
            raise ValueError("it names an adapter twice")
        return of

    def part_names(self) -> tuple[str, ...]:
        return self.of

    def sites(self, survey: Survey) -> list[Site]:
        raise RouteError(f"{type(self).__name__} names no adapter that it is made of: write of=('a', 'b')")


def in_model_order(survey: Survey, sites: Iterable[Site]) -> list[Site]:
    """The sites by the order in which the survey has their modules."""
    order = {path: i for i, path in reversed(list(enumerate(site.path for site in survey.sites)))}
    return sorted(sites, key=lambda site: order.get(site.path, len(order)))


def whole_modules(survey: Survey, parts: Mapping[str, Sequence[Site]], reads_input: bool = False) -> list[Site]:
    """One site for each module that any part acts on: its whole output, or its parameters where parts change those.

    reads_input: the composition reads what the sites' own inputs are.
    """
    found: dict[str, Site] = {}
    for site in (site for sites in parts.values() for site in sites):
        path = site.path if site.reader is None else site.reader
        if path in found:
            continue
        own = [s for s in survey.sites if (s.path, s.port, s.channels, s.reader) == (path, "out", None, None)]
        whole = next((s for s in own if s.role == site.role), own[0] if own else site)
        found[path] = whole.replace(
            path=path,
            module=survey.model.get_submodule(path),
            port="parts",
            channels=None,
            reader=None,
            input_from=whole.input_from if reads_input else None,
            parameter_names=(),
        )
    return in_model_order(survey, found.values())
