"""What `kit.use` returns: a choice already in force, and a context manager that makes it local and puts it back.

It knows the live route of a kit and nothing of adapters, methods or files.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kitout.kit.live import Choice

if TYPE_CHECKING:
    from kitout.kit.kit import Kit


class Worn(AbstractContextManager["Kit"]):
    """What `kit.use` returns: already in force; as a context manager it is local to its context and put back after."""

    def __init__(self, kit: Kit, choice: Choice) -> None:
        self._kit, self._choice = kit, choice
        self._token: Any = None

    def __enter__(self) -> Kit:
        live = self._kit.live
        with live.lock:
            if self._choice in live.sticky:
                live.sticky.remove(self._choice)
            if not live.sticky:
                live.sticky.append(Choice(None))
            self._token = live.local.set(self._choice)
            live.lay(self._kit.resolve())
        return self._kit

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live = self._kit.live
        with live.lock:
            live.local.reset(self._token)
            live.lay(self._kit.resolve())
