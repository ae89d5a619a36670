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
from kitout.data.examples.formats import LOOKED_AT, Layout, detect
from kitout.data.read import tables
from kitout.data.read.hub import HubTable, hub_tables
from kitout.data.read.tables import DataError, Row
from kitout.errors import Faults

Source: TypeAlias = "str | Path | Sequence[str | Path] | Mapping[str, str | Path | Sequence[str | Path]]"

PARTS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
_PART = re.compile(rf"(?i)({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})([-_. ].*)?")
_SLICE = re.compile(r"(?P<name>.+)#((?P<first>\d+):)?(?P<last>\d+)")


@dataclass(frozen=True)
class FileTable:
    """A local file, or its rows from `first` to `last` (excluded). part: "" where the source does not say."""

    path: Path
    part: str = ""
    first: int = 0
    last: int | None = None

    @property
    def where(self) -> str:
        return self.path.name

    def rows(self) -> list[Row]:
        return _filled(tables.rows(self.path)[self.first : self.last], str(self.path))

    def each(self) -> Iterator[Row]:
        return islice(tables.each(self.path), self.first, self.last)


Table: TypeAlias = FileTable | HubTable


@dataclass(frozen=True)
class Loaded:
    """Examples by part ("" where the source names none) and how each table was read."""

    parts: Mapping[str, tuple[Example, ...]]
    layouts: tuple[Layout, ...]


def load(
    source: Source,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    instruction: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Loaded:
    """Every example of a source. limit: at most so many of each part, drawn by the seed, in their order.

    source: a path or hub name, a list of them, or {"train": ..., "validation": ..., "test": ...}. format, columns,
    instruction: see `formats.detect`.
    """
    parts: dict[str, list[Example]] = {}
    layouts = []
    faults = Faults(DataError, "the data cannot be read")
    for table in open_source(source):
        try:
            rows = table.rows()
            layout = detect(rows, table.where, format, columns, instruction)
            layouts.append(layout)
            parts.setdefault(table.part, []).extend(layout.examples(rows))
        except DataError as wrong:
            faults.add(str(wrong))
    faults.raise_if_any()
    return Loaded({part: tuple(_drawn(found, limit, seed)) for part, found in parts.items()}, tuple(layouts))


def open_source(source: Source, streaming: bool = False) -> list[Table]:
    """The tables of a source, none of them read yet."""
    if isinstance(source, Mapping):
        strangers = [part for part in source if part not in PARTS]
        if strangers:
            raise DataError(f"{', '.join(map(repr, strangers))} is no part of a data set; use {', '.join(PARTS)}")
        return [t for part, held in source.items() for t in _of_part(part, open_source(held, streaming))]
    if isinstance(source, str | Path):
        return _tables(str(source), streaming)
    if not source:
        raise DataError("the list of data files is empty; name at least one")
    return [t for one in source for t in open_source(one, streaming)]


def layout_of(table: Table, **how: Any) -> Layout:
    """The layout of a table from its first rows alone."""
    first = list(islice(table.each(), LOOKED_AT))
    return detect(_filled(first, table.where), table.where, **how)


def part_named(name: str) -> str:
    """dev, validation_matched, train-00000-of-00002 -> the part; "" for any other name."""
    found = _PART.fullmatch(name)
    return SPLIT_NAMES[found[1].lower()] if found else ""


def _of_part(part: str, found: list[Table]) -> list[Table]:
    """A source that has several parts gives the one that is asked for; any other is what it is said to be."""
    named = sorted({table.part for table in found})
    if len(named) == 1:
        return [replace(table, part=part) for table in found]
    chosen = [table for table in found if table.part == part]
    if not chosen:
        raise DataError(f"the source given for {part} has the parts {', '.join(named)}, but no {part}; name one file")
    return chosen


def _tables(source: str, streaming: bool) -> list[Table]:
    whole = Path(source).expanduser()
    cut = None if whole.exists() else _SLICE.fullmatch(source)
    path = Path(cut["name"]).expanduser() if cut else whole
    first, last = (int(cut["first"] or 0), int(cut["last"])) if cut else (0, None)
    if path.is_dir():
        return [FileTable(p.path, p.part, first, last) for p in _folder(path)]
    if path.is_file() or path.suffix.lower() in tables.READERS or not _like_hub(source):
        return [FileTable(path, "", first, last)]
    return list(hub_tables(source, part_named, streaming))


def _like_hub(source: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?(#.+)?", source) is not None


def _folder(root: Path) -> list[FileTable]:
    """Files named after the parts; or the only file there is."""
    files = sorted(p for p in root.iterdir() if p.suffix.lower() in tables.READERS and not p.name.startswith("."))
    parted = [FileTable(p, part_named(p.stem)) for p in files if part_named(p.stem)]
    if any(table.part == "train" for table in parted):
        return parted
    data = [p for p in files if p.suffix.lower() not in (".json", ".txt")] or files
    if len(data) == 1 and not parted:
        return [FileTable(data[0])]
    names = ", ".join(p.name for p in files[:8]) or "no tables"
    raise DataError(
        f"{root} holds {names}; expected a train file (train.jsonl), perhaps beside validation and test files, "
        f"or one table alone ({', '.join(tables.READERS)}); a list of files is taken as one set"
    )


def _filled(rows: list[Row], where: str) -> list[Row]:
    if not rows:
        raise DataError(f"{where} holds no rows")
    return rows


def _drawn(found: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(found):
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]
