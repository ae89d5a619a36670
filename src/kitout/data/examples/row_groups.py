"""Groups of rows: rows with the same value in one column (the passage of a question) are not independent examples.

The column is read beside the format's own, and may be one of these. A table is read as it would be without groups,
unless only the column of the groups keeps it from being recognized. It knows rows, and nothing of splits and intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kitout.data.examples import formats
from kitout.data.read.tables import DataError, Row
from kitout.errors import suggest


def detect_grouped(
    rows: Sequence[Row], source: str, group: str | None, *, columns: Mapping[str, str] | None = None, **options: Any
) -> formats.TableReading:
    """How these rows are read, each with its group. group: a column; None: every row stands for itself.

    columns, options: those of `formats.detect`. DataError names the columns where there is none of this name.
    """
    if group is None:
        return formats.detect(rows, source, columns=columns, **options)
    present = list(dict.fromkeys(str(column) for _, row in rows for column in row))
    if group not in present:
        raise DataError(
            f"{source} (columns: {formats.shown(present)}): there is no column {group!r}, asked for as the group; "
            f"{suggest(group, present)}"
        )
    try:
        reading = formats.detect(rows, source, columns=columns, **options)
    except DataError as error:
        others = [(line, {name: value for name, value in row.items() if name != group}) for line, row in rows]
        try:
            reading = formats.detect(others, source, columns=columns, **options)
        except DataError:
            raise error from None
    unused = tuple(column for column in reading.unused_columns if column != group)
    note = "; ".join(filter(None, (reading.note, f"in groups of one {group}")))
    return replace(reading, unused_columns=unused, note=note, group=group)
