"""Bounds on work that do not depend on what else a machine does: lines of Python executed, in place of seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Work:
    """The lines executed so far."""

    lines: int = 0


@contextmanager
def at_most(lines: int) -> Iterator[Work]:
    """Fails as soon as the block has executed more lines of Python, of whatever module, in this thread."""
    work, before = Work(), sys.gettrace()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            work.lines += 1
            if work.lines > lines:
                sys.settrace(before)
                raise AssertionError(f"more than {lines:,} lines executed")
        return trace

    sys.settrace(trace)
    try:
        yield work
    finally:
        sys.settrace(before)
