"""The file that predictions are written to: begun, continued after a stop, and whole at the end.

Until the end rows are in `.part` as JSON, one a line, and `.part.json` says how many inputs they answer, of which
content, with which adapter and options. Whatever was written behind that is cut off, so the result has the same bytes
however often it was stopped. At the end it becomes .jsonl, .csv, .tsv or .parquet. It knows no model and no input.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kitout.errors import ConfigError, Errors, FileError
from kitout.files.atomic import replacing, write_text
from kitout.files.system_errors import as_path, as_path_error

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
VERSION = 1
MAX_LISTED = 5  # bad rows that are shown
PARQUET_ROWS = 2000  # of one write
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of characters that a terminal may act on


@dataclass
class OutputProgress:
    """How far an output file is."""

    settings: dict[str, Any]
    """What decides a prediction, as words to compare."""
    num_inputs: int = 0
    """Inputs that are done, bad ones included."""
    num_bytes: int = 0
    """Of the rows that answer them."""
    digest: str = ""
    """Of these inputs."""
    names: dict[str, str] = field(default_factory=dict)
    """A predicted value -> the column it is written to."""
    num_written: int = 0
    """Predictions."""
    num_bad: int = 0
    """Inputs that could not be read."""
    bad: list[str] = field(default_factory=list)
    """The first of them."""
    num_truncated: int = 0
    """Inputs that were longer than the model reads."""

    def digest_with(self, content: str) -> str:
        """With another input behind those so far."""
        return hashlib.sha256(f"{self.digest}\0{content}".encode("utf-8", "surrogatepass")).hexdigest()


class OutputFile:
    """`open()` says where to go on; `append(rows, progress)`; `finish()` makes the file."""

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.path = as_path(path)
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.record = self.path.with_name(f"{self.path.name}.part.json")
        self.overwrite = overwrite
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        if self.path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"--out {self.path}: the ending decides the format, one of {', '.join(SUFFIXES)}")
        if self.path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ConfigError(
                f"--out {self.path}: writing parquet needs pyarrow, not installed here; .csv needs nothing"
            )
        if self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a folder: name a file, {self.path / 'predictions.jsonl'}")
        if self.path.exists() and not overwrite:
            raise FileError(f"{self.path} exists already: name another file, or --overwrite")

    def begin(self, settings: dict[str, Any]) -> OutputProgress:
        """Where to go on. FileError where something else was begun under this name, or another process writes it."""
        with as_path_error("written", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise FileError(f"{self.path} is being written by another process") from None
            progress = None if self.overwrite else self._read_record()
            if progress is None:
                self.record.unlink(missing_ok=True)
                self.part.write_bytes(b"")
                return OutputProgress(settings)
            errors = Errors(FileError, f"{self.part} was begun with other settings (--overwrite begins anew)")
            for name in sorted({*settings, *progress.settings}):
                before, now = progress.settings.get(name), settings.get(name)
                if before != now:
                    errors.add(f"{name} was {before}, and is {now}")
            errors.raise_if_any()
            os.truncate(self.part, progress.num_bytes)
            return progress

    def append(self, rows: list[dict[str, Any]], progress: OutputProgress) -> None:
        """Rows, and how far it is with them."""
        data = "".join(to_json(row) + "\n" for row in rows).encode()
        with as_path_error("written", self.part):
            with self.part.open("ab") as file:
                file.write(data)
            progress.num_bytes += len(data)
            progress.num_written += len(rows)
            write_text(self.record, json.dumps({"version": VERSION, **asdict(progress)}))

    def rows(self) -> Iterator[dict[str, Any]]:
        """All that were written."""
        with self.part.open(encoding="utf-8", newline="\n") as file:
            yield from map(json.loads, file)

    def finish(self, types: Mapping[str, Any] | None = None) -> Path:
        """Makes the file. types: Arrow types of columns that came from a parquet file."""
        suffix = self.path.suffix.lower()
        with as_path_error("written", self.path):
            if suffix == ".jsonl":
                os.replace(self.part, self.path)
            else:
                with replacing(self.path) as temp:
                    if suffix == ".parquet":
                        _write_parquet(temp, self.rows, types or {})
                    else:
                        _write_csv(temp, self.rows, "," if suffix == ".csv" else "\t")
                self.part.unlink()
            self.record.unlink(missing_ok=True)
        return self.path

    def close(self) -> None:
        """Another process may write it."""
        self._lock.release()
        if not self.part.exists():
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def _read_record(self) -> OutputProgress | None:
        """What an earlier process left; None where there is nothing."""
        if not self.part.exists():
            return None
        try:
            fields = json.loads(self.record.read_text(encoding="utf-8"))
            if fields.pop("version") != VERSION:
                raise ValueError("of another version")
            progress = OutputProgress(**fields)
        except FileNotFoundError:
            return None  # stopped before the first rows were whole
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(f"{self.record} is damaged ({str(error)[:100]}): --overwrite begins anew") from None
        if self.part.stat().st_size < progress.num_bytes:
            raise FileError(f"{self.part} is shorter than {self.record} says: --overwrite begins anew")
        return progress


def to_json(row: Mapping[str, Any] | list[Any]) -> str:
    """One line. Characters that a terminal would act on are escapes, which JSON reads back as what they are."""
    text = json.dumps(row, ensure_ascii=False, default=_plain)
    for char in set(text):
        if unicodedata.category(char) in UNSAFE:
            text = text.replace(char, json.dumps(char)[1:-1])
    return text


def _plain(value: Any) -> Any:
    """What JSON has no form for: dates, decimals; of bytes (an image in a table) only how many there are."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"({len(value):,} bytes)"
    return value.isoformat() if callable(getattr(value, "isoformat", None)) else str(value)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return to_json(value) if isinstance(value, list | dict) else value


def _columns(rows: Iterator[dict[str, Any]]) -> list[str]:
    """Of all rows, in the order in which they come first."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return list(names)


def _write_csv(path: Path, rows: Callable[[], Iterator[dict[str, Any]]], separator: str) -> None:
    names = _columns(rows())
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerow(names)
        for row in rows():
            writer.writerow([_cell(row.get(name)) for name in names])


def _write_parquet(path: Path, rows: Callable[[], Iterator[dict[str, Any]]], types: Mapping[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    def batches() -> Iterator[list[dict[str, Any]]]:
        batch: list[dict[str, Any]] = []
        for row in rows():
            batch.append(row)
            if len(batch) == PARQUET_ROWS:
                yield batch
                batch = []
        if batch:
            yield batch

    def array(values: list[Any], kind: Any = None) -> Any:
        """As the type says; values that do not fit it, or have none in common, are JSON."""
        try:
            found = pyarrow.array(values)
            return found if kind is None or found.type == kind else found.cast(kind)
        except (pyarrow.ArrowException, OverflowError):
            if kind is not None and not pyarrow.types.is_string(kind):
                raise
            return pyarrow.array([v if v is None or isinstance(v, str) else to_json(v) for v in values])

    names, kinds = _columns(rows()), dict[str, Any]()
    for batch in batches():
        for name in names:
            values = [row.get(name) for row in batch]
            kind = types.get(name)
            try:
                found = array(values, kind).type
            except (pyarrow.ArrowException, OverflowError):
                found = array(values).type
            kinds[name] = _common_type(kinds.get(name), found)
    schema = pyarrow.schema(
        [(name, pyarrow.string() if pyarrow.types.is_null(kind) else kind) for name, kind in kinds.items()]
    )
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for batch in batches():
            columns = [array([row.get(name) for row in batch], schema.field(name).type) for name in names]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _common_type(first: Any, second: Any) -> Any:
    """A type for the values of both; text where they have none in common."""
    import pyarrow

    if first is None or first == second:
        return second
    try:
        schemas = [pyarrow.schema([("value", kind)]) for kind in (first, second)]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field("value").type
    except pyarrow.ArrowException:
        return pyarrow.string()


def same_file(path: Path, source: str) -> bool:
    """Whether a source that a user names is this file; a text is none."""
    try:
        return path.exists() and path.samefile(Path(source).expanduser())
    except (OSError, RuntimeError, ValueError):  # there is no such file, or no file can be called so
        return False
