"""One run, one process: a lock in the run's folder that the system itself lets go when the process is gone.

The file says who holds it, for the message to others, and is touched while it is held: where the kernel's locks do not
reach (another machine, a file system without them), a file that has not been touched for a while is nobody's. It
knows no run.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kitout.errors import ConfigError

FILE = ".run.lock"
BEAT = 20.0  # seconds between touches
DEAD = 6 * BEAT


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is this process's own inside; ConfigError if another process works in it."""
    file = folder / FILE
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        owner, taken = _owner(handle), _taken(handle)
        if taken is False:
            raise ConfigError(f"{folder} is in use by {_named(owner)}: wait for it, stop it, or say another folder")
        local = taken and owner.get("host") == socket.gethostname()
        if owner and not local and (rest := DEAD - _age(handle, folder)) > 0:
            raise ConfigError(
                f"{folder} is in use by {_named(owner)}: if that process is gone, try again in {rest:.0f} seconds "
                f"or delete {file}"
            )
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        _say(handle, json.dumps(me))
        try:
            with _beating(handle):
                yield
        finally:
            _say(handle, "")  # the file stays: to delete it would let two others hold what each takes for it
    finally:
        os.close(handle)


def _taken(handle: int) -> bool | None:
    """Whether the kernel's lock is ours now; None where there is none to be had."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind the words, which others must be able to read
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _age(handle: int, folder: Path) -> float:
    """Seconds since the file was touched, by the clock of its own file system."""
    with tempfile.TemporaryFile(dir=folder) as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(handle).st_mtime


@contextmanager
def _beating(handle: int) -> Iterator[None]:
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            os.utime(handle)

    thread = threading.Thread(target=beat, name="kitout-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _owner(handle: int) -> dict[str, Any]:
    """Who wrote the file last; {} if it was let go, or nobody did."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        owner = json.loads(os.read(handle, 4096))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _say(handle: int, words: str) -> None:
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, words.encode())


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    host = owner.get("host")
    where = "" if host == socket.gethostname() else f" on {host}"
    return f"process {owner.get('pid')}{where} since {owner.get('since')}"
