"""Rows from a file the user names, each with its line: .jsonl, .json (a list), .csv, .tsv, .parquet, .txt.

All at once, every fault told together, or one after the other for files that do not fit into memory. Columns are found
by their usual names or told. It opens files only to read, runs nothing it reads, and knows neither texts nor images.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from kitout.errors import Faults, KitoutError

SHOWN = 5  # faults of one kind told in full
LONGEST = 2**30  # characters of one field of a table; Python's own limit of 131,072 is less than a long document

BINARY = {  # how files begin that are often taken for tables
    b"\x1f\x8b": "a gzip archive: unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as .csv",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first (unzstd)",
    b"PAR1": "a parquet table: name it .parquet",
    b"\x80": "a Python pickle, which is never read: save it as .jsonl or .parquet",
}

Row = tuple[int, dict[str, Any]]  # line, columns
Wanted = Mapping[str, tuple[str | None, Sequence[str]]]  # role -> the column asked for or None, its usual names
_Lazy: TypeAlias = Callable[[Path], Iterator[Row]]
_Read = TypeVar("_Read")


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
    read = _reader(path, READERS)
    with _told_plainly(path):
        found = read(path)
    if not found:
        raise DataError(f"{path} holds no rows")
    return found


def each(path: Path) -> Iterator[Row]:
    """The rows of a file one after the other, none kept. The first faulty one raises."""
    if path.suffix.lower() == ".json":
        raise DataError(
            f"{path}: a JSON list is read as a whole and cannot be streamed; write one object a line, .jsonl"
        )
    read = _reader(path, LAZY)
    with _told_plainly(path):
        yield from read(path)


def _reader(path: Path, readers: Mapping[str, _Read]) -> _Read:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in READERS) if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}" + (f"; beside it: {', '.join(near[:8])}" if near else ""))
    read = readers.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: unknown format {path.suffix or '(no ending)'}; use {', '.join(READERS)}")
    return read


@contextmanager
def _told_plainly(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as wrong:
        with path.open("rb") as file:
            begins = file.read(8)
        for mark, what in BINARY.items():
            if begins.startswith(mark):
                raise DataError(f"{path} holds no text but {what}") from wrong
        raise DataError(f"{path} is not UTF-8 (byte {wrong.start}); convert it, e.g. with iconv -t UTF-8") from wrong


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
            faults.add(
                f"none of the columns looks like the {role}; say which with --{role} NAME "
                f"(kitout train: data.train.columns.{role}=NAME)"
            )
        chosen.append(column or "")
    faults.raise_if_any()
    return chosen


def _jsonl(path: Path) -> list[Row]:
    found: list[Row] = []
    bad: list[str] = []
    for line, row in _objects(path):
        if isinstance(row, str):
            bad.append(row)
        else:
            found.append((line, row))
    faults = Faults(DataError, str(path))
    told(faults, bad, "lines")
    faults.raise_if_any()
    return found


def _each_object(path: Path) -> Iterator[Row]:
    for line, row in _objects(path):
        if isinstance(row, str):
            raise DataError(f"{path}: {row}")
        yield line, row


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each line's object, or what is wrong with the line."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, words in enumerate(file, start=1):
            if not words.strip():
                continue
            try:
                row = json.loads(words.rstrip("\r\n"))
                fault = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, expected an object"
                if _broken(words, row):
                    fault = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
            except (json.JSONDecodeError, RecursionError) as wrong:
                said = f"{wrong.msg}, column {wrong.colno}" if isinstance(wrong, json.JSONDecodeError) else "too deep"
                row, fault = None, f"not JSON ({said})"
            yield line, f"line {line}: {fault}: {words.strip()[:60]!r}" if fault else row


def _broken(words: str, row: Any) -> bool:
    """Whether strings hold what JSON can write and no text can: one half of a pair."""
    if "\\ud" not in words.lower():
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _json(path: Path) -> list[Row]:
    try:
        words = path.read_text(encoding="utf-8-sig")
        found = json.loads(words)
    except json.JSONDecodeError as wrong:
        raise DataError(
            f"{path} line {wrong.lineno}: not JSON ({wrong.msg}); if one object per line: name it .jsonl"
        ) from wrong
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path} must hold a list of objects, found a {type(found).__name__}")
    rows = list(enumerate(found, start=1))
    bad = [number for number, row in rows if _broken(words, row)]
    if bad:
        raise DataError(f"{path} object {bad[0]}: half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return rows


def _records(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        limit = csv.field_size_limit(LONGEST)
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            names = list(reader.fieldnames or ())
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise DataError(f"{path}: the header names {', '.join(map(repr, twice))} more than once")
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path} line {reader.line_num}: more fields than the {len(names)} of the header; "
                        'put fields that hold the separator in quotes ("...")'
                    )
                yield reader.line_num, row
        except csv.Error as wrong:
            raise DataError(f"{path} line {reader.line_num}: no readable table ({wrong})") from wrong
        finally:
            csv.field_size_limit(limit)


def _batches(path: Path) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{path}: reading parquet needs pyarrow, not installed here\n  pip install 'kitout[data]'")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as wrong:
        raise DataError(f"{path} is no readable parquet file: {str(wrong)[:200]}") from wrong


def _texts(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, words in enumerate(file, start=1):
            if words.strip():
                yield line, {"text": words.rstrip("\r\n")}


def _all(read: _Lazy) -> Callable[[Path], list[Row]]:
    return lambda path: list(read(path))


LAZY: dict[str, _Lazy] = {
    ".jsonl": _each_object,
    ".ndjson": _each_object,
    ".csv": _records,
    ".tsv": _records,
    ".parquet": _batches,
    ".txt": _texts,
}
READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    **{ending: _all(read) for ending, read in LAZY.items() if ending not in (".jsonl", ".ndjson")},
}
