"""Composition: a route under a name, so that it is activated, saved, loaded and merged like one adapter.

It holds no values: where its name stands in a route, the route itself runs (`runtime/routing/expand.py`). Its strength
is y + s * (what the route makes of y - y). It knows routes as data, and nothing of the adapters that they name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, PlainSerializer

from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import RouteError
from kitout.method import TrainingDefaults, register
from kitout.methods.compositions.combined import MadeOfAdapters
from kitout.route import Route, adapter_names, normalize_route, route_from_json, route_to_json


def _as_entry(value: object) -> object:
    try:
        entry = normalize_route(route_from_json(value))
    except RouteError as error:
        raise ValueError(str(error)) from None
    if isinstance(entry, tuple):
        raise ValueError("a list is one entry per row, and rows are those of a batch: name a route for all rows")
    if entry is not None and not list(adapter_names(entry)):
        raise ValueError("it names no adapter: write a name, Stack('a', 'b') or Mix({'a': 0.5})")
    return entry


@register
class Composition(MadeOfAdapters):
    """A route under a name: its adapters as one, applied as the route says.

    route: a name, a Stack, Mix, Only or Average of adapters that the kit has.
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults()
    limitations: ClassVar[str] = "what its adapters have: tokens have no strength and are in no Mix"

    route: Annotated[Any, BeforeValidator(_as_entry), PlainSerializer(route_to_json)] = None

    def part_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(adapter_names(self.route)))

    def fixed_route(self) -> Route:
        route: Route = self.route
        return route

    def sites(self, survey: Survey) -> list[Site]:
        raise RouteError("Composition names no adapter: write route=Stack('a', 'b') or another route")

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return 0
