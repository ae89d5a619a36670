"""What a large data set does before anything is shown: a line now and then, and an error before memory runs out.

Reading, comparing and encoding keep all examples in memory. A set that will not fit is found out while its rows are
read, with what to write instead. It knows no format and no tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from kitout.base import memory
from kitout.errors import DataError
from kitout.format import format_bytes, format_duration

FIRST_LINE_SECONDS, LINE_SECONDS, HINT_SECONDS = 5.0, 15.0, 30.0
# Bytes of the examples, their keys and tokens over those of the rows alone, measured on short texts.
MEMORY_GROWTH = 3.0
MIN_GROWTH_BYTES = 256 * 2**20  # below, nothing is concluded
ADVICE = "data.streaming=true (with train.steps) reads it while training; path#100000 takes its first rows"


class ReadingProgress:
    """Called with what is done (`tick` of `kitout.data`). log: gets the lines to print."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log, self.started = log, time.monotonic()
        self.next_line = self.started + FIRST_LINE_SECONDS
        self._start_bytes = memory.current(torch.device("cpu"))

    def __call__(self, action: str, done: int, total: int = 0) -> None:
        if not total:
            self._check_memory(action, done)
        now = time.monotonic()
        if now < self.next_line:
            return
        self.next_line = now + LINE_SECONDS
        seconds = now - self.started
        amount = f"{done:,} of {total:,}" if total else f"{done:,} rows"
        hint = f" ({ADVICE})" if seconds > HINT_SECONDS else ""
        self.log(f"{action}: {amount}, {format_duration(seconds)}{hint}")

    def check_estimate(self, num_bytes: float, notes: Sequence[str]) -> None:
        """As while all rows are read, for rows of which a sample is read: a run keeps them all."""
        available = memory.available(torch.device("cpu"))
        if available is not None and num_bytes > MIN_GROWTH_BYTES and available < (1 + MEMORY_GROWTH) * num_bytes:
            raise DataError(
                f"{'; '.join(notes)}: too large to be held in memory: all rows take about {format_bytes(num_bytes)}, "
                f"training on them about {MEMORY_GROWTH:g} times more, and {format_bytes(available)} are left; {ADVICE}"
            )

    def _check_memory(self, action: str, done: int) -> None:
        growth = memory.current(torch.device("cpu")) - self._start_bytes
        available = memory.available(torch.device("cpu"))
        if available is not None and growth > MIN_GROWTH_BYTES and available < MEMORY_GROWTH * growth:
            raise DataError(
                f"{action}: too large to be held in memory: {done:,} rows take {format_bytes(growth)}, training on "
                f"them about {MEMORY_GROWTH:g} times more, and {format_bytes(available)} are left; {ADVICE}"
            )
