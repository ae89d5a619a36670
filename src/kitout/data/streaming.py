"""Examples of a source that does not fit into memory, shuffled through a buffer, resumed exactly.

A stream is a plain value: the same seed, buffer and epoch give the same order, and `skip(n)` begins where n examples
were taken. What is measured on is taken from the front and left out of every epoch by its input, so that nothing leaks.
It knows no token but what an encoder makes, and no model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeAlias

from kitout.data.encode.item import Item
from kitout.data.examples.examples import Example
from kitout.data.examples.formats import Layout
from kitout.data.read.sources import Source, Table, layout_of, open_source
from kitout.data.read.tables import DataError, Row

BUFFER = 10_000  # rows in memory; neighbours in the file come out up to about this far apart
CHUNK = 256  # examples encoded at once

_Read: TypeAlias = "tuple[Layout, Row]"
Encode: TypeAlias = Callable[[Sequence[Example]], list[Item]]


@dataclass(frozen=True)
class Stream:
    """Iterates over examples; every iteration begins anew, the same. buffer 1: in the order of the files."""

    tables: tuple[Table, ...]
    layouts: tuple[Layout, ...]
    seed: int = 0
    buffer: int = BUFFER
    epoch: int = 0
    taken: int = 0
    measured: frozenset[str] = field(default=frozenset(), repr=False)

    def __iter__(self) -> Iterator[Example]:
        """Raises DataError at a faulty row, with its line."""
        rows = _shuffled(self._rows(), self.buffer, random.Random(f"{self.seed} {self.epoch}"))
        if not self.measured:  # rows that are skipped need not be made examples of
            return (self._example(read) for read in islice(rows, self.taken, None))
        kept = (e for e in map(self._example, rows) if e.input_key not in self.measured)
        return islice(kept, self.taken, None)

    def skip(self, count: int) -> Stream:
        """What comes after `count` more examples, in the same order."""
        return replace(self, taken=self.taken + count)

    def at(self, epoch: int) -> Stream:
        """From its beginning, in the order of another epoch."""
        return replace(self, epoch=epoch, taken=0)

    def first(self, count: int) -> list[Example]:
        """The first examples of the files with different inputs, whatever the seed: to measure on.

        Less those that are measured on already.
        """
        found: dict[str, Example] = {}
        rows = self._rows()
        while len(found) < count and (read := next(rows, None)) is not None:
            example = self._example(read)
            if example.input_key not in self.measured:
                found.setdefault(example.input_key, example)
        return list(found.values())

    def without(self, examples: Iterable[Example]) -> Stream:
        """Less every example whose input is one of these."""
        return replace(self, measured=self.measured | {e.input_key for e in examples})

    def _rows(self) -> Iterator[_Read]:
        for table, layout in zip(self.tables, self.layouts, strict=True):
            for row in table.each():
                yield layout, row

    def _example(self, read: _Read) -> Example:
        layout, row = read
        try:
            return layout.example(row)
        except DataError as wrong:
            raise DataError(f"{layout.where} (read as {layout.format.name}): {wrong}") from wrong


def stream(
    source: Source,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    instruction: str | None = None,
    seed: int = 0,
    buffer: int = BUFFER,
) -> dict[str, Stream]:
    """The streams of a source by part, as `sources.load` has its examples; only the first rows are read now."""
    held: dict[str, list[tuple[Table, Layout]]] = {}
    for table in open_source(source, streaming=True):
        layout = layout_of(table, format=format, columns=columns, instruction=instruction)
        held.setdefault(table.part, []).append((table, layout))
    return {
        part: Stream(tuple(t for t, _ in pairs), tuple(found for _, found in pairs), seed, buffer)
        for part, pairs in held.items()
    }


def items(examples: Iterable[Example], encode: Encode, skip: int = 0) -> Iterator[Item]:
    """The items of a stream, a chunk encoded at a time; skip: items (not examples) that are not wanted again."""
    source = iter(examples)
    while chunk := list(islice(source, CHUNK)):
        made = encode(chunk)
        yield from made[skip:]
        skip = max(skip - len(made), 0)


def _shuffled(rows: Iterator[_Read], buffer: int, dice: random.Random) -> Iterator[_Read]:
    """Each row that comes in pushes a random one out."""
    held = list(islice(rows, max(buffer, 1) - 1))
    for row in rows:
        held.append(row)
        at = dice.randrange(len(held))
        held[at], held[-1] = held[-1], held[at]
        yield held.pop()
    dice.shuffle(held)
    yield from held
