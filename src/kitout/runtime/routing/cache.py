"""Compiled routes kept, so that a serving loop does not compile them again: every single name, and the last mixtures.

It knows routes and their compiled form, and nothing of adapters or tensors.
"""

from __future__ import annotations

from kitout.runtime.routing.active import Bound
from kitout.runtime.routing.route import Mix, Route, Stack, names

KEPT = 32  # of rows, stacks and mixes, which a caller can make without end


class Plans:
    """Bounds by route, the last used last."""

    def __init__(self) -> None:
        self._bounds: dict[Route, Bound] = {}

    def get(self, route: Route) -> Bound | None:
        bound = self._bounds.pop(route, None)
        if bound is not None:
            self._bounds[route] = bound
        return bound

    def keep(self, bound: Bound) -> None:
        composed = [r for r in self._bounds if isinstance(r, (tuple, Stack, Mix))]
        for old in composed[: max(0, len(composed) + 1 - KEPT)]:
            del self._bounds[old]
        self._bounds[bound.route] = bound

    def forget(self, name: str) -> None:
        """Every route that wears this adapter."""
        self._bounds = {r: b for r, b in self._bounds.items() if name not in names(r)}
