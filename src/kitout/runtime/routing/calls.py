"""What a thread is doing in a model right now: forwards, generate, prompts run ahead.

Calls do not move between threads, so this belongs to the thread and not to its context, which tasks and worker threads
copy. It is read at the boundary of model and block, and never in a traced graph. It knows nothing of routes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(eq=False)
class CallsInProgress(threading.local):
    """The calls of one model that the current thread is inside of; each thread reads and writes its own values."""

    forwards: int = 0
    """Forwards that crossed the model boundary, and recomputations whose route is known."""
    generates: int = 0
    """Calls of `generate`, where beams multiply the rows."""
    prefills: int = 0
    """Parts of the model that are run for their keys and values alone."""
    caller_gave_no_positions: bool = True
    """Inside `generate`: its caller gave no positions."""

    @property
    def positions_from_generate(self) -> bool:
        """Whether `position_ids` come from `generate`, which counts them from the mask, and not from a caller."""
        return self.generates > 0 and self.caller_gave_no_positions
