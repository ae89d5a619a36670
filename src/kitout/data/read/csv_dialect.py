"""How the fields of a csv are separated, found by its first rows: in many countries by a semicolon.

A separator fits if it splits the header, and every row of the head into as many fields. The usual one of the ending
wins where it fits. It knows no format and reads no more than the head.
"""

from __future__ import annotations

import csv
from itertools import islice
from pathlib import Path

SEPARATORS = {".csv": ",", ".tsv": "\t"}  # the usual one by ending
OTHER_SEPARATORS = (";", "\t", ",", "|")
HEAD_ROWS = 20


def find_separator(path: Path) -> str:
    """The separator of a file; the usual one where none fits, so that the error is about that one."""
    usual = SEPARATORS[path.suffix.lower()]
    candidates = (usual, *(separator for separator in OTHER_SEPARATORS if separator != usual))
    return next((separator for separator in candidates if _fits(path, separator)), usual)


def separator_note(path: Path) -> str:
    """In words, if the fields of this file are not separated as its ending says."""
    usual = SEPARATORS.get(path.suffix.lower())
    if usual is None or not path.is_file():
        return ""
    found = find_separator(path)
    return "" if found == usual else f"fields separated by {found!r}"


def _fits(path: Path, separator: str) -> bool:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in islice(csv.reader(file, delimiter=separator), HEAD_ROWS + 1) if row]
    except (csv.Error, UnicodeDecodeError):  # reported by whoever reads the file
        return False
    return bool(rows) and len(rows[0]) > 1 and len(set(map(len, rows))) == 1
