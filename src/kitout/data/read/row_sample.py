"""A sample of the rows of large tables, for a dry run: every row is read and checked, few are kept.

Drawn from the whole table, as files are often sorted by class. Reading ends after READ_SECONDS, and the sample is then
of the rows read so far. It counts what it has seen, so that facts of the sample can say what they are of, and knows no
format. Source: Vitter 1985, algorithm R.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterable
from typing import Any, TypeVar

MAX_ROWS = 20_000
MAX_IMAGES = 2_000  # each is opened
MAX_CHARS = 30_000_000  # of all rows kept: long documents take time by their length
MIN_ROWS = 1_000  # kept however long they are
READ_SECONDS = 15.0  # of all tables together
_CLOCK_ROWS = 1_000  # between two looks at the clock

_T = TypeVar("_T")


class RowSample:
    """Draws at most `max_rows` of each table. Its counts are of the table drawn last."""

    def __init__(self, max_rows: int = MAX_ROWS, seconds: float = READ_SECONDS) -> None:
        self.max_rows = max_rows
        self.deadline = time.monotonic() + seconds
        self.num_rows = 0
        self.num_drawn = 0
        self.is_whole = True
        """Whether the table was read to its end."""

    def draw(self, rows: Iterable[_T], seed: int = 0) -> list[_T]:
        """In the order of the table; all of a table that is small."""
        rng = random.Random(seed)
        drawn: list[tuple[int, _T]] = []
        self.num_rows, self.is_whole = 0, True
        for number, row in enumerate(rows):
            self.num_rows += 1
            if number < self.max_rows:
                drawn.append((number, row))
            elif (place := int(rng.random() * self.num_rows)) < self.max_rows:
                drawn[place] = (number, row)
            if self.num_rows % _CLOCK_ROWS == 0 and number > self.max_rows and time.monotonic() > self.deadline:
                self.is_whole = False
                break
        if self.num_rows > MIN_ROWS:
            rng.shuffle(drawn)  # a place says how early its row came
            drawn = drawn[: _num_fitting(drawn)]
        self.num_drawn = len(drawn)
        return [row for _, row in sorted(drawn, key=lambda pair: pair[0])]

    @property
    def scale(self) -> float:
        """Rows of the table for each row drawn."""
        return self.num_rows / max(1, self.num_drawn)

    @property
    def note(self) -> str:
        """What the facts are of, in words; "" where they are of all rows."""
        if self.num_drawn == self.num_rows:
            return ""
        which = f"{self.num_rows:,} rows" if self.is_whole else f"the first {self.num_rows:,} rows (reading took long)"
        return f"counted over a sample of {self.num_drawn:,} of {which}"


def size_in_memory(value: Any) -> int:
    """Bytes of Python values and of all that they hold."""
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(map(size_in_memory, value.values()))  # the keys are shared by all rows
    return size + sum(map(size_in_memory, value)) if isinstance(value, list | tuple) else size


def count_chars(value: Any) -> int:
    """Characters and bytes of the texts in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict | list | tuple):
        return sum(map(count_chars, value.values() if isinstance(value, dict) else value))
    return 0


def _num_fitting(drawn: list[tuple[int, _T]]) -> int:
    """How many of them, from the first on, have MAX_CHARS characters together."""
    total = 0
    for count, (_, row) in enumerate(drawn):
        total += count_chars(row)
        if total > MAX_CHARS and count >= MIN_ROWS:
            return count
    return len(drawn)
