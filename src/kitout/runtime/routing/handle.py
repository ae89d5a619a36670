"""What `kit.use` returns: a choice already in force, and a context manager that makes it local and puts it back.

A choice becomes sticky, for every thread, once its handle is dropped without having been entered, or its thread goes
on (`Live.settle`). It knows the state of a kit and nothing of methods or files.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

from kitout.runtime.routing.active import Choice
from kitout.runtime.routing.route import names
from kitout.runtime.state import KitState

T = TypeVar("T")


class Worn(AbstractContextManager[T], Generic[T]):
    """What `kit.use` returns: already in force; as a context manager it is local to its context and put back after."""

    def __init__(self, kit: T, state: KitState, choice: Choice) -> None:
        self._kit, self._state, self._choice = kit, state, choice
        self._thread = threading.get_ident()
        self._tokens: list[Any] = []

    def __enter__(self) -> T:
        live = self._state.live
        with live.lock:
            if live.pending.get(self._thread) is self._choice:
                del live.pending[self._thread]
            elif self._choice in live.sticky:
                live.sticky.remove(self._choice)
            if not live.sticky:
                live.sticky.append(Choice(None))
            self._tokens.append(live.local.set(self._choice))
            live.entered.update(set(names(self._choice.route)))
            live.lay(self._state.resolve())
        return self._kit

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live = self._state.live
        with live.lock:
            live.local.reset(self._tokens.pop())
            live.entered.subtract(set(names(self._choice.route)))
            live.lay(self._state.resolve())

    def __del__(self) -> None:
        live = self._state.live
        if live.pending.get(self._thread) is self._choice:
            live.settle(self._thread)
