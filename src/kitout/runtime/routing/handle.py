"""What `kit.use` returns: a choice already in force, and a context manager that makes it local to its block.

Whether a choice is sticky is decided in `ActiveRoute`, by what happens next, and not by what becomes of this object.
It knows the state of a kit and nothing of methods or files.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Generic, TypeVar
from weakref import ref

from kitout.route import Route
from kitout.runtime.routing.active import RouteActivation, WithBlock
from kitout.runtime.state import KitState

T = TypeVar("T")


class Activated(AbstractContextManager[T], Generic[T]):
    """A choice in force; as a context manager it is local to its context, and the route before it comes back after."""

    def __init__(self, kit: T, state: KitState, route: Route) -> None:
        self._kit, self._state = kit, state
        self._activation = RouteActivation(route, ref(self))
        self._blocks: list[WithBlock] = []  # entered and not left, in any context
        active = state.active
        with active.lock:
            state.compile(route)  # RouteError before anything changes
            active.choose(self._activation)
            active.install(state.compiled_route())

    def __enter__(self) -> T:
        active = self._state.active
        self._blocks.append(active.enter(self._activation))  # before the lock, which a forward may hold for long
        try:
            with active.lock:
                active.install(self._state.compiled_route())
        except BaseException:  # such as Ctrl-C while it waits: no __exit__ follows
            active.leave(self._blocks)
            raise
        return self._kit

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        active = self._state.active
        if active.leave(self._blocks):
            with active.lock:
                active.install(self._state.compiled_route())
