"""What `kit.use` returns: a choice already in force, and a context manager that makes it local and puts it back.

A choice becomes sticky, for every thread, once its handle is dropped without having been entered, or its thread goes
on (`Live.settle`). It knows the state of a kit and nothing of methods or files.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

from kitout.runtime.routing.active import RouteActivation
from kitout.runtime.routing.route import adapter_names
from kitout.runtime.state import KitState

T = TypeVar("T")


class Activated(AbstractContextManager[T], Generic[T]):
    """What `kit.use` returns: already in force; as a context manager it is local to its context and put back after."""

    def __init__(self, kit: T, state: KitState, activation: RouteActivation) -> None:
        self._kit, self._state, self._activation = kit, state, activation
        self._thread = threading.get_ident()
        self._tokens: list[Any] = []

    def __enter__(self) -> T:
        live = self._state.active
        with live.lock:
            if live.pending.get(self._thread) is self._activation:
                del live.pending[self._thread]
            elif self._activation in live.sticky:
                live.sticky.remove(self._activation)
            if not live.sticky:
                live.sticky.append(RouteActivation(None))
            self._tokens.append(live.context_choice.set(self._activation))
            live.in_with_blocks.update(set(adapter_names(self._activation.route)))
            live.install(self._state.compiled_route())
        return self._kit

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live = self._state.active
        with live.lock:
            live.context_choice.reset(self._tokens.pop())
            live.in_with_blocks.subtract(set(adapter_names(self._activation.route)))
            live.install(self._state.compiled_route())

    def __del__(self) -> None:
        live = self._state.active
        if live.pending.get(self._thread) is self._activation:
            live.make_sticky(self._thread)
