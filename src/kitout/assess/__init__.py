"""What adapters did to a model: quality on sets of examples, forgetting, cost, each against the base with intervals.

`kitout.assess.run` (`kitout eval` on the command line). One run asks base and adapters the same examples; the base is
asked once for each set and its answers are kept. It trains nothing.
"""

from kitout.assess.runner import Assessment, run

__all__ = ["Assessment", "run"]
