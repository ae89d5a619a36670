"""Rows from a file the user names, each with its line: .jsonl, .json (a list), .csv, .tsv and .parquet.

Columns are found by their usual names or told. Every fault of a file is told at once, the first few in full. It opens
files only to read, runs nothing it reads, and knows neither texts nor images.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kitout.errors import Faults, KitoutError

SHOWN = 5  # faults of one kind told in full

Row = tuple[int, dict[str, Any]]  # line, columns
Wanted = Mapping[str, tuple[str | None, Sequence[str]]]  # role -> the column asked for or None, its usual names


class DataError(KitoutError, ValueError):
    """A data file that is missing, unreadable or not what can be learnt from."""


def told(faults: Faults, messages: Sequence[str], what: str) -> None:
    """The first few faults of one kind in full, then how many more there are."""
    for message in messages[:SHOWN]:
        faults.add(message)
    if len(messages) > SHOWN:
        faults.add(f"and {len(messages) - SHOWN} more such {what}")


def word(value: object) -> str:
    """A cell as a label or a text: stripped, empty for what is no single value."""
    return "" if value is None or isinstance(value, list | dict) else str(value).strip()


def rows(path: Path) -> list[Row]:
    """Every row of a file with its line (.json and .parquet: its number)."""
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in READERS) if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}" + (f"; beside it: {', '.join(near[:8])}" if near else ""))
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: unknown format {path.suffix or '(no ending)'}; use {', '.join(READERS)}")
    try:
        found = read(path)
    except UnicodeDecodeError as wrong:
        raise DataError(f"{path} is not UTF-8 (byte {wrong.start}); convert it, e.g. with iconv -t UTF-8") from wrong
    if not found:
        raise DataError(f"{path} holds no rows")
    return found


def columns(path: Path, found: Sequence[Row], wanted: Wanted) -> list[str]:
    """The column of each role, in order: the one asked for, else the first usual name that is there."""
    present = [str(column) for column in found[0][1]]
    faults = Faults(DataError, f"{path} (columns: {', '.join(present)})")
    chosen = []
    for role, (asked, usual) in wanted.items():
        if asked is not None and asked not in present:
            faults.add(f"there is no column {asked!r} for the {role}")
        column = asked or next((c for name in usual for c in present if c.lower() == name), None)
        if column is None:
            faults.add(f"none of the columns looks like the {role}; say which with --{role} NAME ({role}=NAME)")
        chosen.append(column or "")
    faults.raise_if_any()
    return chosen


def _jsonl(path: Path) -> list[Row]:
    found: list[Row] = []
    bad: list[str] = []
    for line, words in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not words.strip():
            continue
        try:
            row = json.loads(words)
            fault = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, expected an object"
        except json.JSONDecodeError as wrong:
            row, fault = None, f"not JSON ({wrong.msg}, column {wrong.colno})"
        if fault:
            bad.append(f"line {line}: {fault}: {words.strip()[:60]!r}")
        else:
            found.append((line, row))
    faults = Faults(DataError, str(path))
    told(faults, bad, "lines")
    faults.raise_if_any()
    return found


def _json(path: Path) -> list[Row]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as wrong:
        raise DataError(
            f"{path} line {wrong.lineno}: not JSON ({wrong.msg}); if one object per line: name it .jsonl"
        ) from wrong
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path} must hold a list of objects, found a {type(found).__name__}")
    return list(enumerate(found, start=1))


def _table(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        return [(reader.line_num, row) for row in reader]


def _parquet(path: Path) -> list[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{path}: reading parquet needs pyarrow, not installed here\n  pip install 'kitout[data]'")
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as wrong:
        raise DataError(f"{path} is no readable parquet file: {str(wrong)[:200]}") from wrong
    return list(enumerate(found, start=1))


READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
