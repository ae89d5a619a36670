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

from kitout.data.encode.item import EncodedExample
from kitout.data.examples.examples import Example
from kitout.data.examples.formats import TableReading
from kitout.data.read.sources import Source, Table, detect_from_head, open_source
from kitout.data.read.tables import DataError, Row

BUFFER_ROWS = 10_000  # rows in memory; neighbours in the file come out up to about this far apart
CHUNK_EXAMPLES = 256  # examples encoded at once

_StreamRow: TypeAlias = "tuple[TableReading, Row]"
EncodeFn: TypeAlias = Callable[[Sequence[Example]], list[EncodedExample]]


@dataclass(frozen=True)
class Stream:
    """Iterates over examples; every iteration begins anew, the same. buffer 1: in the order of the files."""

    tables: tuple[Table, ...]
    readings: tuple[TableReading, ...]
    seed: int = 0
    buffer: int = BUFFER_ROWS
    epoch: int = 0
    num_skipped: int = 0
    held_out_keys: frozenset[str] = field(default=frozenset(), repr=False)

    def __iter__(self) -> Iterator[Example]:
        """Raises DataError at a faulty row, with its line."""
        rows = _shuffle(self._iter_rows(), self.buffer, random.Random(f"{self.seed} {self.epoch}"))
        if not self.held_out_keys:  # rows that are skipped need not be made examples of
            return (self._to_example(read) for read in islice(rows, self.num_skipped, None))
        kept = (e for e in map(self._to_example, rows) if e.input_key not in self.held_out_keys)
        return islice(kept, self.num_skipped, None)

    def skip(self, count: int) -> Stream:
        """What comes after `count` more examples, in the same order."""
        return replace(self, num_skipped=self.num_skipped + count)

    def for_epoch(self, epoch: int) -> Stream:
        """From its beginning, in the order of another epoch."""
        return replace(self, epoch=epoch, num_skipped=0)

    def take_unique(self, count: int) -> list[Example]:
        """The first examples of the files with different inputs, whatever the seed: to measure on.

        Less those that are measured on already.
        """
        found: dict[str, Example] = {}
        rows = self._iter_rows()
        while len(found) < count and (read := next(rows, None)) is not None:
            example = self._to_example(read)
            if example.input_key not in self.held_out_keys:
                found.setdefault(example.input_key, example)
        return list(found.values())

    def excluding(self, examples: Iterable[Example]) -> Stream:
        """Less every example whose input is one of these."""
        return replace(self, held_out_keys=self.held_out_keys | {e.input_key for e in examples})

    def _iter_rows(self) -> Iterator[_StreamRow]:
        for table, layout in zip(self.tables, self.readings, strict=True):
            for row in table.iter_rows():
                yield layout, row

    def _to_example(self, stream_row: _StreamRow) -> Example:
        layout, row = stream_row
        try:
            return layout.to_example(row)
        except DataError as wrong:
            raise DataError(f"{layout.source} (read as {layout.format.name}): {wrong}") from wrong


def open_stream(
    source: Source,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    seed: int = 0,
    buffer: int = BUFFER_ROWS,
) -> dict[str, Stream]:
    """The streams of a source by part, as `sources.load` has its examples; only the first rows are read now."""
    held: dict[str, list[tuple[Table, TableReading]]] = {}
    for table in open_source(source, streaming=True):
        layout = detect_from_head(table, format=format, columns=columns, system_prompt=system_prompt)
        held.setdefault(table.split, []).append((table, layout))
    return {
        part: Stream(tuple(t for t, _ in pairs), tuple(found for _, found in pairs), seed, buffer)
        for part, pairs in held.items()
    }


def encode_stream(examples: Iterable[Example], encode: EncodeFn, skip: int = 0) -> Iterator[EncodedExample]:
    """The items of a stream, a chunk encoded at a time; skip: items (not examples) that are not wanted again."""
    source = iter(examples)
    while chunk := list(islice(source, CHUNK_EXAMPLES)):
        made = encode(chunk)
        yield from made[skip:]
        skip = max(skip - len(made), 0)


def _shuffle(rows: Iterator[_StreamRow], buffer: int, rng: random.Random) -> Iterator[_StreamRow]:
    """Each row that comes in pushes a random one out."""
    held = list(islice(rows, max(buffer, 1) - 1))
    for row in rows:
        held.append(row)
        at = rng.randrange(len(held))
        held[at], held[-1] = held[-1], held[at]
        yield held.pop()
    rng.shuffle(held)
    yield from held
