"""What the second word of `kitout predict` means: a table, texts, an image, a folder of images, a text or stdin.

Decided before any model is loaded, by what is on the disk and what the adapter reads; what it cannot read is an error
that says what to give instead. It reads no row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from kitout.data.read import tables
from kitout.errors import ConfigError, DataError
from kitout.files.usage_record import UsageRecord
from kitout.format import short_repr
from kitout.predict.answer_inputs import WHAT_TO_GIVE, scores_answers
from kitout.predict.input_rows import InputRows, images_in
from kitout.train.objectives.tasks import USES

STDIN, STDIN_NAME = "-", "stdin"
MAX_NAME_CHARS = 200


def open_input(source: str, usage: UsageRecord, column_names: Mapping[str, str], stdin: TextIO) -> InputRows:
    """What a user names, before anything is loaded. DataError where it is not what this adapter reads."""
    task = USES[usage.task]
    _check_columns(source, column_names)
    _check_table(source, usage)
    if source == STDIN:
        if task.reads_images:
            raise DataError("this adapter reads images: give an image, a folder of images, or a table of their paths")
        return InputRows(usage, STDIN_NAME, lines=stdin, column_names=column_names)
    path = _existing(source)
    suffix = Path(source[-MAX_NAME_CHARS:]).suffix.lower()
    is_image = suffix in _image_suffixes()
    if path is None:
        looks_like_file = suffix in tables.READERS or is_image or _names_a_place(source)
        if task.reads_images or looks_like_file:
            reads = ", and this adapter reads images, not texts" if task.reads_images else ""
            raise DataError(f"there is no file or folder {source[:MAX_NAME_CHARS]}{reads}")
        if not source.strip():
            raise DataError("the text is empty: give a text, a file or - for lines of stdin")
        return InputRows(usage, "the text", lines=[source])
    if path.is_dir():
        if not task.reads_images:
            raise DataError(f"{path} is a folder, and this adapter reads texts: name a file ({_readable()})")
        if not images_in(path):
            raise DataError(f"{path} holds no image ({' '.join(_image_suffixes())}), not in its folders either")
        return InputRows(usage, str(path), path)
    if task.reads_images and not is_image and (suffix == ".txt" or suffix not in tables.READERS):
        raise DataError(
            f"{path} is no image ({' '.join(_image_suffixes())}), and this adapter reads images: give an image, a "
            "folder of images, or a table with a column of their paths (.csv, .jsonl, .parquet)"
        )
    if not task.reads_images and is_image:
        raise DataError(f"{path} is an image, and this adapter reads texts ({usage.task}): give a text or a table")
    if not task.reads_images and suffix not in tables.READERS:
        raise DataError(f"{path}: unknown format {suffix or '(no ending)'}; use {_readable()}")
    rows = InputRows(usage, path.name, path, column_names=column_names)
    rows.num_rows = _count_rows(path) if suffix in tables.READERS else 1
    return rows


def _check_columns(source: str, column_names: Mapping[str, str]) -> None:
    path = None if source == STDIN else _existing(source)
    if column_names and (path is None or path.is_dir()):
        raise ConfigError(f"--column says what the columns of a table hold, and {short_repr(source)} is no table")


def _check_table(source: str, usage: UsageRecord) -> None:
    """A text alone is no answer to a prompt."""
    is_table = source != STDIN and _existing(source) is not None and not source.lower().endswith(".txt")
    if scores_answers(usage) and not is_table:
        raise DataError(f"{short_repr(source)} is no table; {WHAT_TO_GIVE}")


def _names_a_place(source: str) -> bool:
    """It is written as a path is, or the folder is there: "24/7" and "yes/no" are texts, "a/b/c" is a path."""
    if any(map(str.isspace, source)) or "/" not in source:
        return False
    is_path = source.count("/") > 1 or source.startswith(("/", "./", "../", "~"))
    return is_path or _existing(source.rpartition("/")[0]) is not None


def _existing(source: str) -> Path | None:
    """The file or folder of that name; None where it is a text."""
    if not source.strip():
        return None
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, a zero character, no such home
        return None


def _count_rows(path: Path) -> int | None:
    """About how many: lines of text files, for a progress bar."""
    if path.suffix.lower() in (".parquet", ".json"):
        return None
    try:
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b"")) + 1
    except OSError:
        return None  # said by whoever reads it


def _image_suffixes() -> tuple[str, ...]:
    try:
        from kitout.data.images.image_set import IMAGE_SUFFIXES  # images need pillow, which texts do without
    except DataError:
        return (".png", ".jpg", ".jpeg")
    return IMAGE_SUFFIXES


def _readable() -> str:
    return ", ".join(tables.READERS)
