"""A folder that is written whole or not at all: new or empty before, on a disk with room for it.

It knows sizes and paths, and nothing of what is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from kitout.errors import FileError, PathError
from kitout.files.atomic import replace_folder
from kitout.files.system_errors import as_path, as_path_error
from kitout.format import format_bytes


def check_new_folder(folder: str | PathLike[str]) -> Path:
    """The path; FileError where something is there that would be lost."""
    path = as_path(folder)
    with as_path_error("written", path):
        if path.is_dir() and (names := sorted(entry.name for entry in path.iterdir())):
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise FileError(f"{path} is not empty (it holds {shown}): name a new or empty folder")
        if path.exists() and not path.is_dir():
            raise FileError(f"{path} is a file: name a new or empty folder")
    return path


def write_new_folder(path: Path, num_bytes: int, write_into: Callable[[Path], None]) -> None:
    """`write_into` fills a folder that appears at `path` when it is done; on an error nothing of it is left."""
    with as_path_error("written", path):
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if free < num_bytes:
            raise PathError(
                f"{path} needs {format_bytes(num_bytes)}, and {format_bytes(free)} are free there: free some space, or "
                "name a folder on another disk"
            )
        replace_folder(path, (), write_into)


def folder_bytes(path: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
