"""Examples of a source that does not fit into memory, shuffled through a buffer, resumed exactly.

A stream is a plain value: the same seed, buffer and epoch give the same order, and `skip(n)` begins after n examples.
Validation and test examples are taken from the front and left out of every epoch by their input, so nothing leaks.
StreamedItems shows a stream as the sequence of items a trainer asks for. It knows no token but what an encoder makes,
and no model.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeAlias, overload

from kitout.data.encode.item import EncodedExample
from kitout.data.examples.examples import Example
from kitout.data.examples.formats import TableReading
from kitout.data.read.sources import Source, Table, detect_from_head, open_source
from kitout.data.read.tables import DataError, Row
from kitout.errors import BadRows

BUFFER_ROWS = 10_000  # rows in memory; neighbors in the file come out up to about this far apart
CHUNK_EXAMPLES = 256  # examples encoded at once
BUFFERED_ITEMS = 4096  # items kept behind the newest one

_StreamRow: TypeAlias = "tuple[TableReading, Row]"
EncodeFn: TypeAlias = Callable[[Sequence[Example]], list[Any]]


@dataclass(frozen=True)
class Stream:
    """Iterates over examples; every iteration begins at the start, in the same order."""

    tables: tuple[Table, ...]
    """Read one after the other."""
    readings: tuple[TableReading, ...]
    """How each table is read."""
    seed: int = 0
    """Of the order."""
    buffer: int = BUFFER_ROWS
    """Rows to shuffle among; 1: in the order of the files."""
    epoch: int = 0
    """Each epoch has its own order."""
    num_skipped: int = 0
    """Examples left out at the start of the epoch."""
    held_out_keys: frozenset[str] = field(default=frozenset(), repr=False)
    """Input keys of the examples that every epoch leaves out."""
    skipped: list[str] | None = field(default=None, repr=False, compare=False)
    """Gets a message for every bad row, which is left out; None: bad rows are errors."""

    def __iter__(self) -> Iterator[Example]:
        """Raises DataError at the first bad row, with its line, unless bad rows are left out."""
        rows = _shuffle(self._iter_rows(), self.buffer, random.Random(f"{self.seed} {self.epoch}"))
        if not self.held_out_keys and self.skipped is None:  # rows that are skipped need not be made examples of
            return (self._to_example(row) for row in islice(rows, self.num_skipped, None))
        kept = (e for e in self._to_good_examples(rows) if e.input_key not in self.held_out_keys)
        return islice(kept, self.num_skipped, None)

    def skip(self, count: int) -> Stream:
        """What comes after `count` more examples, in the same order."""
        return replace(self, num_skipped=self.num_skipped + count)

    def for_epoch(self, epoch: int) -> Stream:
        """From its beginning, in the order of another epoch."""
        return replace(self, epoch=epoch, num_skipped=0)

    def take_unique(self, count: int) -> list[Example]:
        """The first examples of the files with different inputs, whatever the seed: for validation or test.

        Less those that are held out already.
        """
        examples: dict[str, Example] = {}
        good_examples = self._to_good_examples(self._iter_rows())
        while len(examples) < count and (example := next(good_examples, None)) is not None:
            if example.input_key not in self.held_out_keys:
                examples.setdefault(example.input_key, example)
        return list(examples.values())

    def excluding(self, examples: Iterable[Example]) -> Stream:
        """Less every example whose input is one of these."""
        return replace(self, held_out_keys=self.held_out_keys | {e.input_key for e in examples})

    def _iter_rows(self) -> Iterator[_StreamRow]:
        for table, reading in zip(self.tables, self.readings, strict=True):
            for row in table.iter_rows(self.skipped):
                yield reading, row

    def _to_good_examples(self, rows: Iterable[_StreamRow]) -> Iterator[Example]:
        for row in rows:
            try:
                example = self._to_example(row)
            except DataError as error:
                if self.skipped is None:
                    raise
                self.skipped.append(str(error))
            else:
                yield example

    def _to_example(self, stream_row: _StreamRow) -> Example:
        reading, row = stream_row
        try:
            return reading.to_example(row)
        except DataError as error:
            raise BadRows(f"{reading.source} (read as {reading.format.name}): {error}") from error


class StreamedItems(Sequence[EncodedExample]):
    """The items of a stream as a sequence: `items[i]` for growing i, epoch after epoch without end.

    Only the last BUFFERED_ITEMS are kept; an earlier index reads the stream again from its beginning. Its length is
    unknown, so `len` is the number of items read so far. Items without trained tokens are left out.
    """

    def __init__(self, source: Stream, encode: EncodeFn) -> None:
        self.source, self.encode = source, encode
        self._restart()

    def _restart(self) -> None:
        self._buffer: deque[EncodedExample] = deque(maxlen=BUFFERED_ITEMS)
        self._num_read = 0
        self._items = self._repeat_epochs()

    def _repeat_epochs(self) -> Iterator[EncodedExample]:
        epoch = self.source.epoch
        while True:
            num_read_before = self._num_read
            for item in encode_stream(self.source.for_epoch(epoch), self.encode):
                if item.num_targets:
                    self._num_read += 1
                    yield item
            if self._num_read == num_read_before:
                raise DataError("an epoch of the stream has no tokens to train on")
            epoch += 1

    def __len__(self) -> int:
        return self._num_read

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EncodedExample]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._num_read))]
        if index < self._num_read - len(self._buffer):
            self._restart()
        while self._num_read <= index:
            self._buffer.append(next(self._items))
        return self._buffer[index - self._num_read]


def open_stream(
    source: Source,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    seed: int = 0,
    buffer: int = BUFFER_ROWS,
    skipped: list[str] | None = None,
    kinds: Collection[str] | None = None,
) -> dict[str, Stream]:
    """The streams of a source by split, as `load_examples` has its examples; only the first rows are read now.

    skipped: see `Stream`. kinds: see `formats.detect`.
    """
    tables_by_split: dict[str, list[tuple[Table, TableReading]]] = {}
    for table in open_source(source, streaming=True):
        options = {"format": format, "columns": columns, "system_prompt": system_prompt, "kinds": kinds}
        reading = detect_from_head(table, skipped, **options)
        tables_by_split.setdefault(table.split, []).append((table, reading))
    return {
        split: Stream(
            tuple(table for table, _ in pairs), tuple(reading for _, reading in pairs), seed, buffer, skipped=skipped
        )
        for split, pairs in tables_by_split.items()
    }


def encode_stream(examples: Iterable[Example], encode: EncodeFn, skip: int = 0) -> Iterator[EncodedExample]:
    """The items of a stream, encoded in chunks. skip: items (not examples) to leave out at the start."""
    source = iter(examples)
    while chunk := list(islice(source, CHUNK_EXAMPLES)):
        items = encode(chunk)
        yield from items[skip:]
        skip = max(skip - len(items), 0)


def _shuffle(rows: Iterator[_StreamRow], buffer: int, rng: random.Random) -> Iterator[_StreamRow]:
    """Each row that comes in pushes a random one out."""
    buffered = list(islice(rows, max(buffer, 1) - 1))
    for row in rows:
        buffered.append(row)
        i = rng.randrange(len(buffered))
        buffered[i], buffered[-1] = buffered[-1], buffered[i]
        yield buffered.pop()
    rng.shuffle(buffered)
    yield from buffered
