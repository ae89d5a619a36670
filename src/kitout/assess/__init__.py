"""What adapters did to a model: quality on sets of examples, forgetting, cost, each against the base with intervals.

`kitout.assess.run` (`kitout eval` on the command line). One run asks base and adapters the same examples; the base is
asked once for each set and its answers are kept. It trains nothing. Its names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kitout.assess.assessment import Assessment as Assessment
    from kitout.assess.runner import run as run

__all__ = ["Assessment", "run"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from kitout.assess import runner

        return getattr(runner, name)
    raise AttributeError(f"module 'kitout.assess' has no attribute {name!r}")
