"""Compiled routes kept, so that a serving loop does not compile them again: every single name, and the last mixtures.

It knows routes and their compiled form, and nothing of adapters or tensors.
"""

from __future__ import annotations

from kitout import fast
from kitout.route import Average, Mix, Only, Route, Stack, adapter_names
from kitout.runtime.routing.active import CompiledRoute

MAX_CACHED_ROUTES = 32  # of rows, stacks and mixes, which a caller can make without end


class RouteCache:
    """Compiled routes, the last used last."""

    def __init__(self) -> None:
        self._compiled: dict[Route, CompiledRoute] = {}
        self._is_fast = fast.enabled()  # what was compiled with fast paths has them

    def get(self, route: Route) -> CompiledRoute | None:
        if fast.enabled() != self._is_fast:
            self._compiled, self._is_fast = {}, fast.enabled()
        compiled = self._compiled.pop(route, None)
        if compiled is not None:
            self._compiled[route] = compiled
        return compiled

    def put(self, compiled: CompiledRoute) -> None:
        composed = [r for r in self._compiled if isinstance(r, (tuple, Stack, Mix, Only, Average))]
        for old in composed[: max(0, len(composed) + 1 - MAX_CACHED_ROUTES)]:
            del self._compiled[old]
        self._compiled[compiled.route] = compiled

    def forget(self, name: str) -> None:
        """Every route that names this adapter."""
        self._compiled = {r: b for r, b in self._compiled.items() if name not in adapter_names(r)}
