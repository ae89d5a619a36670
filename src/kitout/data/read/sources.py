"""Where examples come from: a file, a folder of train, validation and test files, a list of files, a name on the hub.

`open_source` finds the tables and which part each is; `load` reads them whole, as examples. `path#500` takes the first
500 rows. The hub needs the `datasets` library; no code of a data set is ever run. It knows no split and no token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from kitout.data.examples.examples import Example
from kitout.data.examples.formats import HEAD_ROWS, TableReading, detect
from kitout.data.read import tables
from kitout.data.read.hub import HubTable, open_hub_tables
from kitout.data.read.tables import DataError, Row
from kitout.errors import Errors

Source: TypeAlias = "str | Path | Sequence[str | Path] | Mapping[str, str | Path | Sequence[str | Path]]"

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
_SPLIT_PATTERN = re.compile(rf"(?i)({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})([-_. ].*)?")
_SLICE_PATTERN = re.compile(r"(?P<name>.+)#((?P<first>\d+):)?(?P<last>\d+)")


@dataclass(frozen=True)
class FileTable:
    """A local file, or its rows from `first` to `last` (excluded). part: "" where the source does not say."""

    path: Path
    split: str = ""
    start: int = 0
    stop: int | None = None

    @property
    def source(self) -> str:
        return self.path.name

    def read_rows(self) -> list[Row]:
        return _check_not_empty(tables.read_rows(self.path)[self.start : self.stop], str(self.path))

    def iter_rows(self) -> Iterator[Row]:
        return islice(tables.iter_rows(self.path), self.start, self.stop)


Table: TypeAlias = FileTable | HubTable


@dataclass(frozen=True)
class LoadedExamples:
    """Examples by part ("" where the source names none) and how each table was read."""

    splits: Mapping[str, tuple[Example, ...]]
    readings: tuple[TableReading, ...]


def load_examples(
    source: Source,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> LoadedExamples:
    """Every example of a source. limit: at most so many of each part, drawn by the seed, in their order.

    source: a path or hub name, a list of them, or {"train": ..., "validation": ..., "test": ...}. format, columns,
    instruction: see `formats.detect`.
    """
    parts: dict[str, list[Example]] = {}
    layouts = []
    faults = Errors(DataError, "the data cannot be read")
    for table in open_source(source):
        try:
            rows = table.read_rows()
            layout = detect(rows, table.source, format, columns, system_prompt)
            layouts.append(layout)
            parts.setdefault(table.split, []).extend(layout.to_examples(rows))
        except DataError as wrong:
            faults.add(str(wrong))
    faults.raise_if_any()
    return LoadedExamples({part: tuple(_sample(found, limit, seed)) for part, found in parts.items()}, tuple(layouts))


def open_source(source: Source, streaming: bool = False) -> list[Table]:
    """The tables of a source, none of them read yet."""
    if isinstance(source, Mapping):
        strangers = [part for part in source if part not in SPLITS]
        if strangers:
            raise DataError(f"{', '.join(map(repr, strangers))} is no part of a data set; use {', '.join(SPLITS)}")
        return [t for part, held in source.items() for t in _tables_of_split(part, open_source(held, streaming))]
    if isinstance(source, str | Path):
        return _find_tables(str(source), streaming)
    if not source:
        raise DataError("the list of data files is empty; name at least one")
    return [t for one in source for t in open_source(one, streaming)]


def detect_from_head(table: Table, **options: Any) -> TableReading:
    """The layout of a table from its first rows alone."""
    first = list(islice(table.iter_rows(), HEAD_ROWS))
    return detect(_check_not_empty(first, table.source), table.source, **options)


def split_named(name: str) -> str:
    """dev, validation_matched, train-00000-of-00002 -> the part; "" for any other name."""
    found = _SPLIT_PATTERN.fullmatch(name)
    return SPLIT_NAMES[found[1].lower()] if found else ""


def _tables_of_split(split: str, candidates: list[Table]) -> list[Table]:
    """A source that has several parts gives the one that is asked for; any other is what it is said to be."""
    named = sorted({table.split for table in candidates})
    if len(named) == 1:
        return [replace(table, split=split) for table in candidates]
    chosen = [table for table in candidates if table.split == split]
    if not chosen:
        raise DataError(f"the source given for {split} has the parts {', '.join(named)}, but no {split}; name one file")
    return chosen


def _find_tables(source: str, streaming: bool) -> list[Table]:
    whole = Path(source).expanduser()
    cut = None if whole.exists() else _SLICE_PATTERN.fullmatch(source)
    path = Path(cut["name"]).expanduser() if cut else whole
    first, last = (int(cut["first"] or 0), int(cut["last"])) if cut else (0, None)
    if path.is_dir():
        return [FileTable(p.path, p.split, first, last) for p in _tables_in_folder(path)]
    if path.is_file() or path.suffix.lower() in tables.READERS or not _looks_like_hub_name(source):
        return [FileTable(path, "", first, last)]
    return list(open_hub_tables(source, split_named, streaming))


def _looks_like_hub_name(source: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?(#.+)?", source) is not None


def _tables_in_folder(folder: Path) -> list[FileTable]:
    """Files named after the parts; or the only file there is."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in tables.READERS and not p.name.startswith("."))
    parted = [FileTable(p, split_named(p.stem)) for p in files if split_named(p.stem)]
    if any(table.split == "train" for table in parted):
        return parted
    data = [p for p in files if p.suffix.lower() not in (".json", ".txt")] or files
    if len(data) == 1 and not parted:
        return [FileTable(data[0])]
    names = ", ".join(p.name for p in files[:8]) or "no tables"
    raise DataError(
        f"{folder} holds {names}; expected a train file (train.jsonl), perhaps beside validation and test files, "
        f"or one table alone ({', '.join(tables.READERS)}); a list of files is taken as one set"
    )


def _check_not_empty(rows: list[Row], source: str) -> list[Row]:
    if not rows:
        raise DataError(f"{source} holds no rows")
    return rows


def _sample(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]
