"""A table as text that fits the terminal: columns that do not fit go into further blocks.

Each block begins with the first column again. It knows columns of text, and nothing of runs.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 120  # where the output is no terminal
MIN_WIDTH = 40
GAP = 3  # blanks between two columns: one on either side, and the box's own


@dataclass(frozen=True)
class TableColumn:
    """One column, as text."""

    title: str
    """Its heading."""
    cells: list[str]
    """One cell per row."""
    right: bool = False
    """Aligned to the right."""
    most: int = 100
    """Characters in a line of it; what is longer is folded."""

    @property
    def width(self) -> int:
        return min(self.most, max(map(cell_len, [self.title, *self.cells])))


def render(columns: Sequence[TableColumn], notes: Sequence[str], width: int | None = None) -> str:
    """The columns in blocks that fit, then the notes. width: of the terminal; None: found."""
    width = max(MIN_WIDTH, width or shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns)
    first, *others = columns
    blocks: list[list[TableColumn]] = [[first]]
    for column in others:
        used = sum(one.width + GAP for one in blocks[-1]) + column.width
        if used > width and len(blocks[-1]) > 1:
            blocks.append([first])
        blocks[-1].append(column)
    page = io.StringIO()
    console = Console(file=page, width=width, color_system=None, force_terminal=False, force_jupyter=False)
    for block in blocks:
        console.print(_block(block), markup=False, highlight=False)
        console.print()
    for note in notes:
        console.print(Text(f"- {note}"), markup=False, highlight=False)
    lines = [line.rstrip() for line in page.getvalue().strip("\n").split("\n")]
    return "\n".join(lines)


def _block(columns: Sequence[TableColumn]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="")
    for column in columns:
        table.add_column(
            column.title, justify="right" if column.right else "left", overflow="fold", max_width=column.most
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, cells))
    return table
