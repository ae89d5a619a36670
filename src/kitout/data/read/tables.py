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

from kitout.errors import DataError as DataError  # for those that import it from here
from kitout.errors import Errors

MAX_SHOWN_ERRORS = 5  # faults of one kind told in full
MAX_FIELD_CHARS = (
    2**30
)  # characters of one field of a table; Python's own limit of 131,072 is less than a long document

BINARY_SIGNATURES = {  # how files begin that are often taken for tables
    b"\x1f\x8b": "a gzip archive: unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as .csv",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first (unzstd)",
    b"PAR1": "a parquet table: name it .parquet",
    b"\x80": "a Python pickle, which is never read: save it as .jsonl or .parquet",
}

Row = tuple[int, dict[str, Any]]  # line, columns
ColumnRequest = Mapping[str, tuple[str | None, Sequence[str]]]  # role -> the column asked for or None, its usual names
_RowIterator: TypeAlias = Callable[[Path], Iterator[Row]]
_ReaderT = TypeVar("_ReaderT")


def add_first(errors: Errors, messages: Sequence[str], noun: str) -> None:
    """The first few faults of one kind in full, then how many more there are."""
    for message in messages[:MAX_SHOWN_ERRORS]:
        errors.add(message)
    if len(messages) > MAX_SHOWN_ERRORS:
        errors.add(f"and {len(messages) - MAX_SHOWN_ERRORS} more such {noun}")


def cell_text(value: object) -> str:
    """A cell as a label or a text: stripped, empty for what is no single value."""
    return "" if value is None or isinstance(value, list | dict) else str(value).strip()


def read_rows(path: Path) -> list[Row]:
    """Every row of a file with its line (.json and .parquet: its number)."""
    read = _find_reader(path, READERS)
    with _explain_binary(path):
        found = read(path)
    if not found:
        raise DataError(f"{path} holds no rows")
    return found


def iter_rows(path: Path) -> Iterator[Row]:
    """The rows of a file one after the other, none kept. The first faulty one raises."""
    if path.suffix.lower() == ".json":
        raise DataError(
            f"{path}: a JSON list is read as a whole and cannot be streamed; write one object a line, .jsonl"
        )
    read = _find_reader(path, STREAMING_READERS)
    with _explain_binary(path):
        yield from read(path)


def _find_reader(path: Path, readers_by_suffix: Mapping[str, _ReaderT]) -> _ReaderT:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in READERS) if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}" + (f"; beside it: {', '.join(near[:8])}" if near else ""))
    read = readers_by_suffix.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: unknown format {path.suffix or '(no ending)'}; use {', '.join(READERS)}")
    return read


@contextmanager
def _explain_binary(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as wrong:
        with path.open("rb") as file:
            begins = file.read(8)
        for mark, what in BINARY_SIGNATURES.items():
            if begins.startswith(mark):
                raise DataError(f"{path} holds no text but {what}") from wrong
        raise DataError(f"{path} is not UTF-8 (byte {wrong.start}); convert it, e.g. with iconv -t UTF-8") from wrong


def find_columns(path: Path, rows: Sequence[Row], requests: ColumnRequest) -> list[str]:
    """The column of each role, in order: the one asked for, else the first usual name that is there."""
    present = [str(column) for column in rows[0][1]]
    faults = Errors(DataError, f"{path} (columns: {', '.join(present)})")
    chosen = []
    for role, (asked, usual) in requests.items():
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


def _read_jsonl(path: Path) -> list[Row]:
    found: list[Row] = []
    bad: list[str] = []
    for line, row in _parse_lines(path):
        if isinstance(row, str):
            bad.append(row)
        else:
            found.append((line, row))
    faults = Errors(DataError, str(path))
    add_first(faults, bad, "lines")
    faults.raise_if_any()
    return found


def _iter_objects(path: Path) -> Iterator[Row]:
    for line, row in _parse_lines(path):
        if isinstance(row, str):
            raise DataError(f"{path}: {row}")
        yield line, row


def _parse_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each line's object, or what is wrong with the line."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, words in enumerate(file, start=1):
            if not words.strip():
                continue
            try:
                row = json.loads(words.rstrip("\r\n"))
                fault = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, expected an object"
                if _has_broken_surrogate(words, row):
                    fault = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
            except (json.JSONDecodeError, RecursionError) as wrong:
                said = f"{wrong.msg}, column {wrong.colno}" if isinstance(wrong, json.JSONDecodeError) else "too deep"
                row, fault = None, f"not JSON ({said})"
            yield line, f"line {line}: {fault}: {words.strip()[:60]!r}" if fault else row


def _has_broken_surrogate(text: str, row: Any) -> bool:
    """Whether strings hold what JSON can write and no text can: one half of a pair."""
    if "\\ud" not in text.lower():
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_json(path: Path) -> list[Row]:
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
    bad = [number for number, row in rows if _has_broken_surrogate(words, row)]
    if bad:
        raise DataError(f"{path} object {bad[0]}: half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return rows


def _iter_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        limit = csv.field_size_limit(MAX_FIELD_CHARS)
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


def _iter_parquet(path: Path) -> Iterator[Row]:
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


def _iter_text_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, words in enumerate(file, start=1):
            if words.strip():
                yield line, {"text": words.rstrip("\r\n")}


def _read_whole(reader: _RowIterator) -> Callable[[Path], list[Row]]:
    return lambda path: list(reader(path))


STREAMING_READERS: dict[str, _RowIterator] = {
    ".jsonl": _iter_objects,
    ".ndjson": _iter_objects,
    ".csv": _iter_csv,
    ".tsv": _iter_csv,
    ".parquet": _iter_parquet,
    ".txt": _iter_text_lines,
}
READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    **{ending: _read_whole(read) for ending, read in STREAMING_READERS.items() if ending not in (".jsonl", ".ndjson")},
}
