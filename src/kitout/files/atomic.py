"""Files and folders written whole or not at all: under another name beside the target, then put in its place.

Whatever fails in between, the target is as it was and nothing else is left; a reader sees the old one or the new one.
On Linux an existing folder is exchanged in one system call; elsewhere two renames are used, the first of which is
taken back if the second fails. It knows nothing of what is in a file, and of a folder only the names of its files.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from kitout.errors import FileError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


def write_text(file: Path, text: str) -> Path:
    """The text, in UTF-8, becomes the file."""
    return write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> Path:
    """The bytes become the file. A kill leaves the former file, and maybe `.<name>.<pid>` beside it."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_bytes(data)
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
    return file


def replace_folder(target: Path, files: Collection[str], write_into: Callable[[Path], None]) -> None:
    """`fill` writes into an empty folder, which then becomes `target`.

    target may be new, empty, or hold nothing but `files` (it is replaced then); anything else is refused, because
    replacing the folder would delete what is not ours.
    """
    target = target.expanduser().resolve()  # a link is followed: the folder it leads to is the one replaced
    check_replaceable(target, files)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".kitout-{uuid.uuid4().hex}"
    try:
        fresh.mkdir()
        write_into(fresh)
        for part in fresh.iterdir():
            flush(part)
        check_replaceable(target, files)  # writing may have taken a while
        _move_into_place(fresh, target)
        flush(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_replaceable(target: Path, files: Collection[str]) -> None:
    """Raises FileError if `target` holds anything but the files that a folder of ours holds."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileError(f"{target} is a file: name a new folder, an empty one, or an adapter folder to replace")
    held = sorted(entry.name for entry in target.iterdir())
    strange = [name for name in held if name not in files]
    if strange:
        shown = ", ".join(strange[:4]) + (", ..." if len(strange) > 4 else "")
        what = "also holds" if set(files) <= set(held) else "is no adapter folder: it holds"
        raise FileError(f"{target} {what} {shown}, which replacing it would delete: name another folder")


def _move_into_place(temp_path: Path, target: Path) -> None:
    """fresh takes the place of target; what target was (if it was not empty) is left under fresh's name."""
    try:
        os.replace(temp_path, target)  # new, or an empty folder
        return
    except OSError:
        if not target.is_dir():
            raise
    if _exchange(temp_path, target):
        return
    aside = temp_path.with_name(temp_path.name + "-old")
    os.replace(target, aside)
    try:
        os.replace(temp_path, target)
    except BaseException:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step where the system can; False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # an old or another libc
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def flush(path: Path) -> None:
    """On the disk and not only in the system's memory, so that a power cut cannot empty what was renamed.

    Some systems cannot flush a folder: there it is left to them.
    """
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what may be written
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not path.is_dir():
            raise
