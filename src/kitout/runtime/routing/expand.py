"""Names of compositions taken apart: what a route means in terms of the adapters that act.

A route under a name becomes that route; an adapter that combines others becomes a `Composed` of them; `Only` becomes
adapters that are at some layers alone. Compiling and merging both begin here, so that neither has to know what a name
stands for. It knows routes and adapters, and nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace

from kitout.base.layers import layer_filter
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import Errors, RouteError
from kitout.route import Average, Composed, Mix, Only, Route, RouteEntry, Stack, adapter_names, check_entry
from kitout.runtime.adapter import Adapter


def expand(route: Route, adapters: Mapping[str, Adapter], survey: Survey | None) -> tuple[Route, Mapping[str, Adapter]]:
    """The route with every composition taken apart, and the adapters that it names then."""
    expander = _Expander(adapters, survey)
    new: Route
    if isinstance(route, tuple):
        new = tuple(map(expander.entry, route))
    else:
        whole = expander.fixed_route(route) if isinstance(route, str) else route
        if isinstance(whole, Average):
            weights: dict[RouteEntry, float] = {}
            for part, weight in whole.parts:
                part = expander.entry(part)
                weights[part] = weights.get(part, 0.0) + weight
            new = Average(weights, whole.of) if len(weights) > 1 else next(iter(weights))
        else:
            new = expander.entry(check_entry(route))
    return new, {**adapters, **expander.views}


def averaging_names(entry: RouteEntry, adapters: Mapping[str, Adapter]) -> list[str]:
    """The names in an entry that stand for an Average, which is no entry of another and has no weights."""
    expander = _Expander(adapters, None)
    names = dict.fromkeys(adapter_names(entry))
    return [name for name in names if name in adapters and isinstance(expander.fixed_route(name), Average)]


class _Expander:
    """Takes entries apart, and collects the adapters that this makes: others' parts under names of their own."""

    def __init__(self, adapters: Mapping[str, Adapter], survey: Survey | None) -> None:
        self.adapters, self.survey = adapters, survey
        self.views: dict[str, Adapter] = {}

    def fixed_route(self, name: str) -> Route:
        """The route that a name stands for; None for an adapter of its own."""
        adapter = self.adapters[name]
        route = adapter.method.fixed_route()
        if isinstance(route, str):
            route = self.fixed_route(route) or route
        if isinstance(route, Average) and (adapter.strength != 1.0 or adapter.heads):
            raise RouteError(f"{name!r} averages outputs: it has no strength and no heads of its own")
        return route

    def entry(self, entry: RouteEntry) -> RouteEntry:
        if isinstance(entry, Stack):
            return Stack(*map(self.entry, entry.parts))
        if isinstance(entry, Mix):
            return _mix([(self.entry(part), weight) for part, weight in entry.parts])
        if isinstance(entry, Only):
            return self._only(entry)
        if not isinstance(entry, str):
            return entry
        adapter = self.adapters[entry]
        route = adapter.method.fixed_route()
        if isinstance(self.fixed_route(entry), Average):
            raise RouteError(
                f"{entry!r} averages whole outputs: it is a route by itself, and no entry or row of another"
            )
        if route is not None:
            return self._route_of(adapter, self.entry(check_entry(route)))
        parts = adapter.method.part_names()
        return Composed(entry, tuple(map(self.entry, parts))) if parts else entry

    def _route_of(self, adapter: Adapter, route: RouteEntry) -> RouteEntry:
        if adapter.heads:  # its own, over those of its parts
            view = copy(adapter)
            view.by_module = {path: replace(m, strength=1.0) for path, m in adapter.by_module.items()}
            view.name = f"{adapter.name} (heads)"
            self.views[view.name] = view
            route = Stack(route, view.name)
        return route if adapter.strength == 1.0 else _mix([(route, adapter.strength)])

    def _only(self, entry: Only) -> RouteEntry:
        if self.survey is None:
            raise RouteError(f"{entry!r} counts layers, and no model is given to count them in")
        errors = Errors(RouteError, f"Only({entry.entry!r}, {entry.layers!r})")
        passes = layer_filter(entry.layers, self.survey.sites, errors)
        errors.raise_if_any()
        inner = self.entry(entry.entry)
        restricted: dict[str, str] = {}
        for name in dict.fromkeys(adapter_names(inner)):
            view = _in_layers({**self.adapters, **self.views}[name], passes)
            restricted[name] = view.name = f"{name} [{entry.layers}]"
            self.views[view.name] = view
        if not any(self.views[name].by_module or self.views[name].prefixes for name in restricted.values()):
            raise RouteError(f"Only({entry.entry!r}, {entry.layers!r}) leaves nothing of it: it acts in other layers")
        return _renamed(inner, restricted)


def _in_layers(adapter: Adapter, passes: Callable[[Site], bool]) -> Adapter:
    """An adapter at the modules and attentions of some layers alone. RouteError where it has tokens in the sequence."""
    if adapter.prompts:
        raise RouteError(f"{adapter.name!r} has tokens in the sequence, which are in no layer: it cannot be in an Only")
    view = copy(adapter)
    view.by_module = {path: m for path, m in adapter.by_module.items() if passes(m.site)}
    view.prefixes = {path: part for path, part in adapter.prefixes.items() if passes(part.site)}
    kept = [relay for m in view.by_module.values() for relay in m.relays]
    relays = {path: [relay for relay in each if relay in kept] for path, each in adapter.input_relays.items()}
    view.input_relays = {path: each for path, each in relays.items() if each}
    return view


def _renamed(entry: RouteEntry, names: Mapping[str, str]) -> RouteEntry:
    if isinstance(entry, Stack):
        return Stack(*(_renamed(part, names) for part in entry.parts))
    if isinstance(entry, Mix):
        return _mix([(_renamed(part, names), weight) for part, weight in entry.parts])
    if isinstance(entry, Composed):
        return Composed(names[entry.name], tuple(_renamed(part, names) for part in entry.parts))
    return names[entry] if isinstance(entry, str) else entry


def _mix(parts: list[tuple[RouteEntry, float]]) -> RouteEntry:
    """A Mix of entries that may have become alike."""
    weights: dict[RouteEntry, float] = {}
    for part, weight in parts:
        if part is not None:
            weights[part] = weights.get(part, 0.0) + weight
    return Mix(weights) if weights else None  # type: ignore[arg-type]
