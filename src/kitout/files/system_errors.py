"""What the system refuses on a path becomes a PathError that names the path, the reason and what to do.

Every way in and out of an adapter's folder goes through these two: `as_path` reads what a user gave as a path, and
`as_path_error` runs the steps that touch the disk. It knows nothing of what a folder holds; `atomic.py` sees to it that
a step that fails leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError

from kitout.errors import PathError

ADVICE = {
    errno.ENOSPC: "free some space, or name a folder on another disk",
    errno.EDQUOT: "free some space, or name a folder on another disk",
    errno.EFBIG: "this process may not write files of that size (ulimit -f)",
    errno.EROFS: "name a folder on a disk that can be written to",
    errno.EACCES: "change its permissions, or name another folder",
    errno.EPERM: "change its permissions, or name another folder",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ENOTDIR: "a part of the path is a file: name another folder",
    errno.EEXIST: "a part of the path is a file: name another folder",
    errno.ENOENT: "no folder can be made there: name another",
    errno.ELOOP: "its links lead in a circle: name the folder itself",
}


def as_path(folder: str | PathLike[str]) -> Path:
    """The path, `~` expanded. PathError for what no folder can be called."""
    try:
        path = Path(folder).expanduser()
        os.fsencode(path)
    except TypeError:
        raise PathError(f"a folder is given by its path, found {str(folder)[:80]!r}") from None
    except RuntimeError as error:  # no such user, or no home
        raise PathError(f"{str(folder)[:200]}: {str(error).rstrip('.')}: write the whole path") from None
    except UnicodeError:
        raise PathError(f"{str(folder)[:200]!r} holds characters that no path can have") from None
    if "\0" in str(path):
        raise PathError(f"{str(folder)[:200]!r} holds a zero character, which no path can have")
    return path


@contextmanager
def as_path_error(action: str, folder: Path) -> Iterator[None]:
    """Whatever the system refuses inside is a PathError."""
    try:
        yield
    except PathError:
        raise
    except (OSError, SafetensorError) as raised:
        error = os_error_of(raised) if isinstance(raised, SafetensorError) else raised
        reason = error.strerror or str(error)
        advice = f": {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        raise PathError(f"{_short(folder)} cannot be {action}: {reason}{advice}") from raised


def os_error_of(error: SafetensorError) -> OSError:
    """The system's error that the writer of safetensors met: its number is only in the text, "... (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, str(error)[:300])


def _short(folder: Path) -> str:
    text = str(folder)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"
