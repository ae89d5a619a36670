"""Files and folders written whole or not at all: under another name beside the target, then renamed to it.

Whatever fails in between, the target is as it was and nothing else is left. A reader sees the old one or the new one.
On Linux an existing folder is exchanged in one system call. Elsewhere two renames are used, and the first is undone if
the second fails. What a killed process has left is removed by the next one; a live process holds what it writes, and
that is left alone. It knows nothing of what is in a file, and of a folder only the names of its files.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kitout.errors import FileError

if sys.platform != "win32":
    import fcntl

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
# What `replace_folder` makes beside a target: the new folder, and the old one under the name of its target.
TEMP_FOLDER = re.compile(r"\.kitout-[0-9a-f]{32}(?:-old-(?P<target>.+))?")
# What `replacing` makes beside a file; without a thread: the main one.
TEMP_FILE = re.compile(r"\.(?P<file>.+)\.(?P<pid>[0-9]+)(?:-(?P<thread>[0-9]+))?")


def write_text(file: Path, text: str) -> Path:
    """Replaces the file with the text, in UTF-8."""
    return write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> Path:
    """Replaces the file with the bytes. A killed process leaves the old file, and maybe a `TEMP_FILE`."""
    with replacing(file) as temp_path:
        temp_path.write_bytes(data)
    return file


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside the file to write to, which replaces it at the end; where that fails, the file is as it was."""
    is_main = threading.current_thread() is threading.main_thread()
    thread = "" if is_main else f"-{threading.get_native_id()}"
    temp_path = file.with_name(f".{file.name}.{os.getpid()}{thread}")
    try:
        yield temp_path
        os.replace(temp_path, file)
    finally:
        temp_path.unlink(missing_ok=True)


def replace_folder(
    target: Path, files: Collection[str], write_into: Callable[[Path], None], optional: Collection[str] = ()
) -> None:
    """`write_into` fills an empty folder, which then becomes `target`.

    target may be new, empty, or hold nothing but `files` and `optional` ones, which are replaced. Anything else is
    refused, because replacing the folder would delete files that are not kitout's.
    """
    target = _resolve(target.expanduser())  # a link is followed: the folder it leads to is the one replaced
    check_replaceable(target, files, optional)
    new_parents = [p for p in target.parents if not p.exists()]  # the innermost first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        with _temp_folder(target.parent) as temp_path:
            write_into(temp_path)
            for file in temp_path.rglob("*"):
                flush(file)
            check_replaceable(target, files, optional)  # writing may have taken a while
            _move_into_place(temp_path, target)
            flush(target.parent)
    finally:
        for parent in new_parents:
            with suppress(OSError):  # it is not empty: all went well, or another process uses it by now
                parent.rmdir()


@contextmanager
def _temp_folder(parent: Path) -> Iterator[Path]:
    """A new folder that this process holds until the block ends, when whatever has its name is deleted."""
    path, handle = _new_held_folder(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _new_held_folder(parent: Path) -> tuple[Path, int | None]:
    while True:
        path = parent / f".kitout-{uuid.uuid4().hex}"
        path.mkdir()
        with suppress(FileNotFoundError, BlockingIOError):  # another process took it for a leftover just now
            handle = _hold(path)
            if path.is_dir():
                return path, handle


def _hold(path: Path) -> int | None:
    """A handle that marks a folder as in use until it is closed or the process ends; None where there is no such mark.

    BlockingIOError where another process holds it.
    """
    if sys.platform == "win32":
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno == errno.EWOULDBLOCK:
            raise
        return None  # a file system without locks
    return handle


def remove_leftovers(folder: Path, is_own_file: Callable[[str], bool] = lambda _name: False) -> None:
    """Deletes what killed processes have left in a folder, and nothing that a live one is writing.

    That is the folders of `replace_folder`, and what `write_bytes` left of the caller's own files. An old folder whose
    successor never came to its place is moved back.
    """
    try:
        paths = [path for path in folder.iterdir() if path.name.startswith(".")]
    except OSError:  # not there, or not to be listed
        return
    for path in paths:
        if (match := TEMP_FOLDER.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # held by a live process, or removed by another one by now
                _remove_folder(path, match["target"])
            continue
        match = TEMP_FILE.fullmatch(path.name)
        if match and is_own_file(match["file"]) and not _is_alive(int(match["pid"]), match["thread"]):
            with suppress(OSError):
                path.unlink()


def _remove_folder(path: Path, target: str | None) -> None:
    handle = _hold(path)
    if handle is None:
        return
    try:
        if target is not None and not (path.parent / target).exists():
            os.replace(path, path.parent / target)
        else:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(handle)


def _is_alive(pid: int, thread: str | None) -> bool:
    """Whether another process has this number, or another thread of this one. What has our own numbers was there before
    us: a container counts anew.
    """
    if pid == os.getpid():
        number = threading.main_thread().native_id if thread is None else int(thread)
        return number != threading.get_native_id() and number in {one.native_id for one in threading.enumerate()}
    if sys.platform == "win32":
        return True  # there os.kill ends a process, whatever the signal
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError:  # how Python before 3.13 says it
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


def check_replaceable(target: Path, files: Collection[str], optional: Collection[str] = ()) -> None:
    """Raises FileError if `target` holds anything but these files. optional: those that not every such folder has."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileError(f"{target} is a file: name a new folder, an empty one, or one that kitout wrote, to replace it")
    present = sorted(entry.name for entry in target.iterdir())
    unexpected = [name for name in present if name not in files and name not in optional]
    if unexpected:
        shown = ", ".join(unexpected[:4]) + (", ..." if len(unexpected) > 4 else "")
        reason = "also holds" if set(files) <= set(present) else "is a folder of something else: it holds"
        raise FileError(f"{target} {reason} {shown}, which replacing it would delete: name another folder")


def _move_into_place(temp_path: Path, target: Path) -> None:
    """Renames temp_path to target. The old folder (if it was not empty) is left under the name of temp_path."""
    try:
        os.replace(temp_path, target)  # new, or an empty folder
        return
    except OSError:
        if not target.is_dir():
            raise
    if _exchange(temp_path, target):
        return
    old_path = temp_path.with_name(f"{temp_path.name}-old-{target.name}")
    os.replace(target, old_path)
    try:
        os.replace(temp_path, target)
    except BaseException:
        os.replace(old_path, target)
        raise
    shutil.rmtree(old_path, ignore_errors=True)


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
    """Writes a file or folder to the disk, so that a power cut cannot empty what was renamed.

    Some systems cannot flush a folder: they do it when they choose.
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
