"""Where the added parts go, which, and how large they are: search under a budget, one pass over data, ranks by it.

`kitout.search.run` (`kitout search` on the command line), `kitout.search.signals` and `kitout.search.allocate`
(`kitout probe-sites`). Its names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kitout.search.allocation import allocate as allocate
    from kitout.search.collection import signals as signals
    from kitout.search.runner import run as run

PLACES = {"allocate": "allocation", "run": "runner", "signals": "collection"}
"""Name -> its file, which has another name so that the two are never taken for each other."""

__all__ = ["allocate", "run", "signals"]


def __getattr__(name: str) -> object:
    if name in PLACES:
        return getattr(importlib.import_module(f"kitout.search.{PLACES[name]}"), name)
    raise AttributeError(f"module 'kitout.search' has no attribute {name!r}")
