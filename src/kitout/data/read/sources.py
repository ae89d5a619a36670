"""Where examples come from: a file, a folder of train, validation and test files, a list of files, a name on the hub.

`open_source` finds the tables and the split of each; `load_examples` reads them whole, as examples. `path#500` takes
the first 500 rows. The hub needs the `datasets` library; no code of a data set is ever run. It makes no split of its
own and knows no token.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from kitout.data.examples.examples import Example
from kitout.data.examples.formats import HEAD_ROWS, TableReading, detect
from kitout.data.examples.row_groups import detect_grouped
from kitout.data.read import tables
from kitout.data.read.csv_dialect import separator_note
from kitout.data.read.hub import HubTable, open_hub_tables
from kitout.data.read.row_sample import RowSample, size_in_memory
from kitout.data.read.tables import DataError, Row
from kitout.errors import BadRows, Errors, UnusableFormat

Source: TypeAlias = "str | Path | Sequence[str | Path] | Mapping[str, str | Path | Sequence[str | Path]]"

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
_SPLIT_PATTERN = re.compile(rf"(?i)({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})([-_. ].*)?")
_HUB_NAME_PATTERN = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?(#.+)?")
_SLICE_PATTERN = re.compile(r"(?P<name>.+)#((?P<first>\d{1,18}):)?(?P<last>\d{1,18})")


@dataclass(frozen=True)
class FileTable:
    """A local file, or some of its rows."""

    path: Path
    """In a format of `tables`."""
    split: str = ""
    """train, validation or test; "" if the source names none."""
    start: int = 0
    """The first row, from 0."""
    stop: int | None = None
    """The row before which it ends; None: all rows."""

    @property
    def source(self) -> str:
        """The name for messages and locations."""
        return self.path.name

    @property
    def note(self) -> str:
        """What was found out about the file itself, in words."""
        return separator_note(self.path)

    def read_rows(
        self, skipped: list[str] | None = None, tick: tables.Tick | None = None, sample: RowSample | None = None
    ) -> list[Row]:
        """skipped, tick, sample: see `tables.read_rows`."""
        rows = tables.read_rows(self.path, skipped, self.start, self.stop, tick, sample)
        return rows if skipped else _check_not_empty(rows, str(self.path))

    def iter_rows(self, skipped: list[str] | None = None) -> Iterator[Row]:
        return islice(tables.iter_rows(self.path, skipped), self.start, self.stop)


Table: TypeAlias = FileTable | HubTable


@dataclass(frozen=True)
class LoadedExamples:
    """The examples of a source."""

    splits: Mapping[str, tuple[Example, ...]]
    """By split; "" if the source names none."""
    readings: tuple[TableReading, ...]
    """How each table was read."""
    skipped: tuple[str, ...] = ()
    """What was left out, a message with file and line for each bad row."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """By split: examples of the source for each one here, 1 where all are."""
    sample_notes: tuple[str, ...] = ()
    """For each table of which a sample was taken: what of, in words."""
    memory: float = 0.0
    """About the bytes that the rows of all of them take, where they were sampled."""


def load_examples(
    source: Source,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
    tick: tables.Tick | None = None,
    sample: RowSample | None = None,
    kinds: Collection[str] | None = None,
    group: str | None = None,
) -> LoadedExamples:
    """Every example of a source. limit: at most so many of each split, sampled by the seed, in their order.

    skip_bad_rows: bad rows are left out and listed; else they are errors, reported together. tick: see
    `tables.counted`. sample: draws the rows of each table that become examples; None: all do.

    source: a path or hub name, a list of them, or {"train": ..., "validation": ..., "test": ...}. format, columns,
    system_prompt, kinds: see `formats.detect`. group: see `row_groups.detect_grouped`.
    """
    splits: dict[str, list[Example]] = {}
    readings = []
    all_skipped: list[str] = []
    errors = Errors(DataError, "the data cannot be read")
    only_rows_are_bad = True
    totals: dict[str, float] = {}
    notes: list[str] = []
    memory = 0.0
    for table in open_source(source):
        skipped: list[str] | None = [] if skip_bad_rows else None
        try:
            rows = table.read_rows(skipped, tick, sample)
            scale = 1.0 if sample is None else sample.scale
            if sample is not None and sample.note:
                notes.append(f"{table.source}: {sample.note}")
                memory += scale * sum(map(size_in_memory, rows))
            reading = detect_grouped(
                rows, table.source, group, format=format, columns=columns, system_prompt=system_prompt,
                note=table.note, kinds=kinds,
            )  # fmt: skip
            readings.append(reading)
            examples = reading.to_examples(tables.counted(rows, tick, f"converting {table.source}"), skipped)
            check_few_skipped(skipped or (), len(examples), table.source)
            splits.setdefault(table.split, []).extend(examples)
            totals[table.split] = totals.get(table.split, 0.0) + scale * len(examples)
            all_skipped += skipped or ()
        except UnusableFormat:
            raise  # of the whole source, whatever is wrong with its rows
        except DataError as error:
            errors.add(str(error))
            only_rows_are_bad &= isinstance(error, BadRows)
    if only_rows_are_bad:
        errors.error = BadRows
    errors.raise_if_any()
    sampled = {split: tuple(_sample(examples, limit, seed)) for split, examples in splits.items()}
    scales = {
        split: min(totals[split], math.inf if limit is None else limit) / max(1, len(examples))
        for split, examples in sampled.items()
    }
    return LoadedExamples(sampled, tuple(readings), tuple(all_skipped), scales, tuple(notes), memory)


def check_few_skipped(skipped: Sequence[str], num_good: int, name: str) -> None:
    """DataError if more rows are bad than good: then the format is not what they are read as."""
    if len(skipped) > num_good:
        errors = Errors(
            DataError, f"{name}: {len(skipped):,} rows are bad and {num_good:,} are not, too many to leave out"
        )
        tables.add_first(errors, skipped, "rows")
        errors.raise_if_any()


def open_source(source: Source, streaming: bool = False) -> list[Table]:
    """The tables of a source, none of them read yet."""
    if isinstance(source, Mapping):
        unknown = [split for split in source if split not in SPLITS]
        if unknown:
            raise DataError(f"{', '.join(map(repr, unknown))} is not a split of a data set; use {', '.join(SPLITS)}")
        return [
            table
            for split, sources in source.items()
            for table in _tables_of_split(split, open_source(sources, streaming))
        ]
    if isinstance(source, str | Path):
        return _find_tables(str(source), streaming)
    if not source:
        raise DataError("the list of data files is empty; name at least one")
    return [table for each in source for table in open_source(each, streaming)]


def detect_from_head(table: Table, skipped: list[str] | None = None, **options: Any) -> TableReading:
    """How a table is read, by its first rows alone. skipped: see `tables.read_rows`."""
    head = list(islice(table.iter_rows(skipped), HEAD_ROWS))
    return detect(_check_not_empty(head, table.source), table.source, note=table.note, **options)


def could_be_on_hub(source: str) -> bool:
    """Whether a name has the form of one on the hub: `owner/name`, or an old one without an owner."""
    return _HUB_NAME_PATTERN.fullmatch(source) is not None


def without_slice(source: str) -> str:
    """`path#500` -> `path`."""
    sliced = _SLICE_PATTERN.fullmatch(source)
    return sliced["name"] if sliced else source


def split_named(name: str) -> str:
    """dev, validation_matched, train-00000-of-00002 -> the split; "" for any other name."""
    match = _SPLIT_PATTERN.fullmatch(name)
    return SPLIT_NAMES[match[1].lower()] if match else ""


def _tables_of_split(split: str, candidates: list[Table]) -> list[Table]:
    """Of a source with several splits the requested one; a source without several becomes that split."""
    named = sorted({table.split for table in candidates})
    if len(named) == 1:
        return [replace(table, split=split) for table in candidates]
    tables_of_split = [table for table in candidates if table.split == split]
    if not tables_of_split:
        raise DataError(f"the source of {split} has the splits {', '.join(named)}, but no {split}; name one file")
    return tables_of_split


def _find_tables(source: str, streaming: bool) -> list[Table]:
    try:
        return _find_tables_at(source, streaming)
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, no permission, no such home
        if isinstance(error, DataError):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{source[:200]!r} cannot be opened: {reason}") from error


def _find_tables_at(source: str, streaming: bool) -> list[Table]:
    whole = Path(source).expanduser()
    sliced = None if whole.exists() else _SLICE_PATTERN.fullmatch(source)
    path = Path(sliced["name"]).expanduser() if sliced else whole
    start, stop = (int(sliced["first"] or 0), int(sliced["last"])) if sliced else (0, None)
    if path.is_dir():
        return [FileTable(table.path, table.split, start, stop) for table in _tables_in_folder(path)]
    if path.is_file() or path.suffix.lower() in tables.READERS or not _HUB_NAME_PATTERN.fullmatch(source):
        return [FileTable(path, "", start, stop)]
    return list(open_hub_tables(source, split_named, streaming))


def _tables_in_folder(folder: Path) -> list[FileTable]:
    """Files named after splits; or the only file there is."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in tables.READERS and not p.name.startswith("."))
    named = [FileTable(p, split_named(p.stem)) for p in files if split_named(p.stem)]
    if any(table.split == "train" for table in named):
        return named
    data_files = [p for p in files if p.suffix.lower() not in (".json", ".txt")] or files
    if len(data_files) == 1 and not named:
        return [FileTable(data_files[0])]
    names = ", ".join(p.name for p in files[:8]) or "no tables"
    raise DataError(
        f"{folder} has {names}; expected a train file (train.jsonl), perhaps beside validation and test files, "
        f"or one table alone ({', '.join(tables.READERS)}); a list of files is taken as one set"
    )


def _check_not_empty(rows: list[Row], source: str) -> list[Row]:
    if not rows:
        raise DataError(f"{source} has no rows")
    return rows


def _sample(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]
