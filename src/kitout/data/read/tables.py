"""Rows from a file the user names, each with its line: .jsonl, .json (a list), .csv, .tsv, .parquet, .txt.

All at once, with all errors reported together, or one after the other for files that do not fit into memory. It only
reads files, runs nothing it reads, and knows no format of examples, no text and no image.
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

MAX_SHOWN_ERRORS = 5  # errors of one kind shown in full
MAX_FIELD_CHARS = 2**30  # of one csv field; Python's own limit of 131,072 is less than a long document

BINARY_SIGNATURES = {  # first bytes of files that are often taken for tables
    b"\x1f\x8b": "a gzip archive: unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as .csv",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first (unzstd)",
    b"PAR1": "a parquet table: name it .parquet",
    b"\x80": "a Python pickle, which is never read: save it as .jsonl or .parquet",
}

Row = tuple[int, dict[str, Any]]  # line, columns
_RowIterator: TypeAlias = Callable[[Path], Iterator[Row]]
_ReaderT = TypeVar("_ReaderT")


def add_first(errors: Errors, messages: Sequence[str], noun: str) -> None:
    """Adds the first few messages of one kind in full, then how many more there are.

    noun: what the messages are about, in the plural: "rows", "images".
    """
    for message in messages[:MAX_SHOWN_ERRORS]:
        errors.add(message)
    if len(messages) > MAX_SHOWN_ERRORS:
        errors.add(f"and {len(messages) - MAX_SHOWN_ERRORS} more such {noun}")


def read_rows(path: Path) -> list[Row]:
    """Every row of a file with its line (.json and .parquet: its number from 1)."""
    read = _find_reader(path, READERS)
    with _explain_binary(path):
        rows = read(path)
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def iter_rows(path: Path) -> Iterator[Row]:
    """The rows of a file one after the other, none kept. The first bad one raises."""
    if path.suffix.lower() == ".json":
        raise DataError(
            f"{path}: a JSON list is read as a whole and cannot be streamed; write one object a line, .jsonl"
        )
    read = _find_reader(path, STREAMING_READERS)
    with _explain_binary(path):
        yield from read(path)


def _find_reader(path: Path, readers_by_suffix: Mapping[str, _ReaderT]) -> _ReaderT:
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*") if p.suffix in READERS) if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}" + (f"; beside it: {', '.join(others[:8])}" if others else ""))
    read = readers_by_suffix.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: unknown format {path.suffix or '(no ending)'}; use {', '.join(READERS)}")
    return read


@contextmanager
def _explain_binary(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            first_bytes = file.read(8)
        for signature, kind in BINARY_SIGNATURES.items():
            if first_bytes.startswith(signature):
                raise DataError(f"{path} is not text but {kind}") from error
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t UTF-8") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    messages: list[str] = []
    for line, row in _parse_lines(path):
        if isinstance(row, str):
            messages.append(row)
        else:
            rows.append((line, row))
    errors = Errors(DataError, str(path))
    add_first(errors, messages, "lines")
    errors.raise_if_any()
    return rows


def _iter_objects(path: Path) -> Iterator[Row]:
    for line, row in _parse_lines(path):
        if isinstance(row, str):
            raise DataError(f"{path}: {row}")
        yield line, row


def _parse_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each line's object, or the error message of the line."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text.rstrip("\r\n"))
                problem = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, expected an object"
                if _has_broken_surrogate(text, row):
                    problem = "half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
            except json.JSONDecodeError as error:
                row, problem = None, f"not JSON ({error.msg}, column {error.colno})"
            except RecursionError:
                row, problem = None, "not JSON (nested too deep)"
            yield line, f"line {line}: {problem}: {text.strip()[:60]!r}" if problem else row


def _has_broken_surrogate(text: str, row: Any) -> bool:
    """Whether strings hold one half of a pair, which JSON can write and no text can."""
    if "\\ud" not in text.lower():
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_json(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {error.lineno}: not JSON ({error.msg}); if one object per line: name it .jsonl"
        ) from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise DataError(f"{path} must hold a list of objects, found a {type(content).__name__}")
    rows = list(enumerate(content, start=1))
    broken = next((number for number, row in rows if _has_broken_surrogate(text, row)), None)
    if broken is not None:
        raise DataError(
            f"{path} object {broken}: half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
        )
    return rows


def _iter_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        limit = csv.field_size_limit(MAX_FIELD_CHARS)
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            names = list(reader.fieldnames or ())
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise DataError(f"{path}: the header names {', '.join(map(repr, repeated))} more than once")
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path} line {reader.line_num}: more fields than the {len(names)} of the header; "
                        'put fields that hold the separator in quotes ("...")'
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: not a readable table ({error})") from error
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
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error)[:200]}") from error


def _iter_text_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield line, {"text": text.rstrip("\r\n")}


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
