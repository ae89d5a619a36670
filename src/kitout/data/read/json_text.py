"""JSON as data files and their cells hold it: what cannot be read is a DataError with its place, whatever it is.

Nesting is bounded, because whoever walks a value later (a chat template, a copy, a writer) would fail on what Python's
parser still reads. It knows no row and no format.
"""

from __future__ import annotations

import json
from typing import Any

from kitout.errors import DataError

MAX_DEPTH = 100  # levels of lists and objects in each other


def parse_json(text: str) -> Any:
    """The value of a text. DataError with its line, if there are several, and column."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}: " if "\n" in text.rstrip() else ""
        raise DataError(f"{line}not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"not JSON that can be read (nested more than {MAX_DEPTH} levels deep)") from error
    except ValueError as error:  # Python bounds the digits of a whole number
        raise DataError("not JSON that can be read (a number of more digits than any number here can have)") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise DataError(f"nested more than {MAX_DEPTH} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict | list):
                inner.extend(one.values() if isinstance(one, dict) else one)
        if not inner:
            return False
        level = inner
    return any(isinstance(one, dict | list) for one in level)
