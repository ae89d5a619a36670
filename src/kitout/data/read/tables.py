"""Rows from a file the user names, each with its line: .jsonl, .json (a list), .csv, .tsv, .parquet, .txt.

All at once, with all errors reported together, or one after the other for files that do not fit into memory. Bad rows
are errors, or left out and listed where the caller gives a list for them. It only reads files, runs nothing it reads,
and knows no format of examples, no text and no image.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from kitout.data.read.arrow_values import class_names_of_file, name_classes, plain_value
from kitout.data.read.csv_dialect import find_separator
from kitout.data.read.json_text import parse_json
from kitout.data.read.row_sample import RowSample, count_chars
from kitout.errors import BadRows, Errors
from kitout.errors import DataError as DataError  # for those that import it from here
from kitout.format import short_repr
from kitout.install_hint import suggest_install

MAX_SHOWN_ERRORS = 5  # errors of one kind shown in full
TICK_ROWS = 20_000
ROW_NOUNS = {".json": "object", ".parquet": "row"}  # what their numbers count; else lines
MAX_LISTED = 1000  # messages of rows that a stream leaves out
MAX_MESSAGE_CHARS = 600  # of the message about one row
# Of one row, a book of 1,200 pages: whoever compares, splits and tokenizes it would take minutes for much more.
MAX_ROW_CHARS = 4_000_000

BINARY_SIGNATURES = {  # first bytes of files that are often taken for tables
    b"\x1f\x8b": "a gzip archive: unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as .csv",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first (unzstd)",
    b"PAR1": "a parquet table: name it .parquet",
    b"\x80": "a Python pickle, which is never read: save it as .jsonl or .parquet",
}
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # how spreadsheets begin "Unicode text"

Row = tuple[int, dict[str, Any]]  # line, columns
_ReadRow: TypeAlias = tuple[int, dict[str, Any] | str]  # line, columns or what is wrong with them
Tick: TypeAlias = Callable[[str, int], None]  # what is being done, and with how many so far
_T = TypeVar("_T")
_RowIterator: TypeAlias = Callable[[Path], Iterator[_ReadRow]]


class StreamedMessages(list[str]):
    """The first messages, each once: a stream meets a bad row again in every epoch."""

    def append(self, message: str) -> None:
        if len(self) < MAX_LISTED and message not in self:
            super().append(message)


def add_first(errors: Errors, messages: Sequence[str], noun: str) -> None:
    """Adds the first few messages of one kind in full, then how many more there are.

    noun: what the messages are about, in the plural: "rows", "images".
    """
    for message in messages[:MAX_SHOWN_ERRORS]:
        errors.add(message)
    errors.add_more(len(messages) - MAX_SHOWN_ERRORS, f"such {noun}")


def counted(items: Iterable[_T], tick: Tick | None, action: str) -> Iterator[_T]:
    """The same, and `tick` is called with the action and their number now and then."""
    for number, item in enumerate(items, start=1):
        if tick is not None and number % TICK_ROWS == 0:
            tick(action, number)
        yield item


def read_rows(
    path: Path, skipped: list[str] | None = None, start: int = 0, stop: int | None = None, tick: Tick | None = None,
    sample: RowSample | None = None,
) -> list[Row]:  # fmt: skip
    """The rows of a file from start to stop, each with its line (.json and .parquet: its number from 1).

    skipped: gets a message for every bad row, which is left out; None: bad rows are a DataError.
    tick: see `counted`. sample: draws those that are kept; None: all are.
    """
    messages: list[str] = [] if skipped is None else skipped
    read = counted(islice(_read_good(path, messages), start, stop), tick, f"reading {path.name}")
    rows = list(read) if sample is None else sample.draw(read)
    if skipped is None:
        errors = Errors(BadRows, str(path))
        add_first(errors, [message.removeprefix(f"{path.name} ") for message in messages], "lines")
        errors.raise_if_any()
    if not rows and not messages:
        raise DataError(f"{path} has no rows")
    return rows


def iter_rows(path: Path, skipped: list[str] | None = None) -> Iterator[Row]:
    """The rows of a file one after the other, none kept. The first bad one raises, or is listed as in `read_rows`."""
    if path.suffix.lower() == ".json":
        raise DataError(
            f"{path}: a JSON list is read as a whole and cannot be streamed; write one object a line, .jsonl"
        )
    messages: list[str] = [] if skipped is None else skipped
    for row in _read_good(path, messages):
        if skipped is None and messages:
            break
        yield row
    if skipped is None and messages:
        raise BadRows(f"{path}: {messages[0].removeprefix(f'{path.name} ')}")


def _read_good(path: Path, messages: list[str]) -> Iterator[Row]:
    """The rows that can be read; a message for each other one."""
    with _explain_system_errors(path):
        read = _find_reader(path)
        noun = ROW_NOUNS.get(path.suffix.lower(), "line")
        is_large = path.stat().st_size > MAX_ROW_CHARS
        for line, row in read(path):
            problem = row if isinstance(row, str) else _size_problem(row) if is_large else ""
            if isinstance(row, str) or problem:
                messages.append(f"{path.name} {noun} {line}: {problem}"[:MAX_MESSAGE_CHARS])
            else:
                yield line, row


def _size_problem(row: dict[str, Any]) -> str:
    size = count_chars(row)
    if size <= MAX_ROW_CHARS:
        return ""
    return f"{size:,} characters in one row, at most {MAX_ROW_CHARS:,}: write it as several rows"


def _find_reader(path: Path) -> _RowIterator:
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*") if p.suffix in READERS) if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}" + (f"; beside it: {', '.join(others[:8])}" if others else ""))
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: unknown format {path.suffix or '(no ending)'}; use {', '.join(READERS)}")
    return read


@contextmanager
def _explain_system_errors(path: Path) -> Iterator[None]:
    """What the system or the decoder of text refuses, in words."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            first_bytes = file.read(8)
        for signature, kind in BINARY_SIGNATURES.items():
            if first_bytes.startswith(signature):
                raise DataError(f"{path} is not text but {kind}") from error
        encoding, guess = "UTF-16", ""
        if not first_bytes.startswith(UTF16_MARKS):
            encoding, guess = "WINDOWS-1252", " (what Windows writes in Western Europe; else name its own encoding)"
        command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8{path.suffix}"
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it{guess}: {command}") from error


def _iter_objects(path: Path) -> Iterator[_ReadRow]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, text in enumerate(file, start=1):
            if len(text) > MAX_ROW_CHARS:
                yield line, f"{len(text):,} characters in one row, at most {MAX_ROW_CHARS:,}: write it as several rows"
                continue
            if not text.strip():
                continue
            try:
                row = parse_json(text.rstrip("\r\n"))
                problem = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, expected an object"
                if _has_broken_surrogate(text, row):
                    problem = "half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
            except DataError as error:
                row, problem = None, str(error)
            yield line, f"{problem}: {text.strip()[:60]!r}" if problem else row


def _has_broken_surrogate(text: str, row: Any) -> bool:
    """Whether strings hold one half of a pair, which JSON can write and no text can."""
    if "\\ud" not in text.lower():
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _iter_json_list(path: Path) -> Iterator[_ReadRow]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = parse_json(text)
    except DataError as error:
        hint = "; if one object per line: name it .jsonl" if ": not JSON" in str(error) else ""
        raise DataError(f"{path} {error}{hint}") from error
    if not isinstance(content, list):
        raise DataError(f"{path} must hold a list of objects, found a {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            yield number, f"a JSON {type(row).__name__}, expected an object: {short_repr(row, 60)}"
        elif _has_broken_surrogate(text, row):
            yield number, "half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
        else:
            yield number, row


def _iter_csv(path: Path) -> Iterator[_ReadRow]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        limit = csv.field_size_limit(MAX_ROW_CHARS)  # Python's own of 131,072 is less than a long document
        reader = csv.DictReader(file, delimiter=find_separator(path), strict=True)
        line = 1  # where the row begins that is read next
        try:
            names = list(reader.fieldnames or ())
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise DataError(f"{path}: the header names {', '.join(map(repr, repeated))} more than once")
            line = reader.line_num + 1
            for row in reader:
                line = reader.line_num + 1
                if None in row:
                    yield (
                        reader.line_num,
                        (
                            f"more fields than the {len(names)} of the header; "
                            'put fields that hold the separator in quotes ("...")'
                        ),
                    )
                else:
                    yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path} {_csv_problem(str(error), line, reader.reader.line_num)}") from error
        finally:
            csv.field_size_limit(limit)


def _csv_problem(message: str, first: int, last: int) -> str:
    """What is wrong with the row of these lines. A field over the limit may be one whose quote does not close."""
    quotes = 'a field that begins with a quote ends with one, and a quote inside it is doubled ("")'
    if "field limit" not in message:
        return f"line {first}: not a readable table ({message}); {quotes}"
    problem = f"a field of more than {MAX_ROW_CHARS:,} characters: write it as several rows"
    return f"line {first}: {problem}" if first == last else f"lines {first} to {last}: {problem}; if unmeant: {quotes}"


def _iter_parquet(path: Path) -> Iterator[_ReadRow]:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{path}: reading parquet needs pyarrow, not installed here\n  {suggest_install(extra='data')}")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number, class_names = 0, class_names_of_file(file.schema_arrow.metadata)
            for batch in file.iter_batches(batch_size=1000):
                for row in _rows_of_batch(batch):
                    number += 1
                    if isinstance(row, dict):
                        row = {name: plain_value(value) for name, value in row.items()}
                        row |= {c: name_classes(names, row[c]) for c, names in class_names.items() if c in row}
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error)[:200]}") from error


def _rows_of_batch(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Python values; a message for a row with a value that Python has none for (no UTF-8, a date far away)."""
    try:
        rows = batch.to_pylist()
    except (ValueError, ArithmeticError):  # of any of the rows
        for i in range(batch.num_rows):
            row: dict[str, Any] = {}
            problem = ""
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    row[name] = column[i].as_py()
                except (ValueError, ArithmeticError) as error:
                    problem = f"{name!r} is not readable ({str(error)[:120]})"
            yield problem or row
        return
    yield from rows


def _iter_text_lines(path: Path) -> Iterator[_ReadRow]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield line, {"text": text.rstrip("\r\n")}


READERS: dict[str, _RowIterator] = {
    ".jsonl": _iter_objects,
    ".ndjson": _iter_objects,
    ".json": _iter_json_list,
    ".csv": _iter_csv,
    ".tsv": _iter_csv,
    ".parquet": _iter_parquet,
    ".txt": _iter_text_lines,
}
