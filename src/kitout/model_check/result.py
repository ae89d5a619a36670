"""ModelCheck: what `kitout.check` found, a table of methods x laws that prints as text.

A cell says whether a law holds for a method on this model, what was measured and what was allowed, or why it could not
be asked. It knows nothing of how the laws are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kitout.format import align_columns, single_line

Outcome = Literal["ok", "refused", "wrong", "error", "not applicable"]
Column = Literal["effect", "rows", "merge", "save", "cache"]
COLUMNS: tuple[Column, ...] = ("effect", "rows", "merge", "save", "cache")
FAILURES: tuple[Outcome, ...] = ("wrong", "error")


@dataclass(frozen=True)
class CheckCell:
    """One law for one method."""

    outcome: Outcome
    """ok: it holds. refused: kitout raised an error of its own. wrong: it does not hold, or gave NaN. error: any other
    exception. not applicable: there is nothing to compare."""
    message: str = ""
    """The reason, or the error with its type and place."""
    difference: float | None = None
    """Largest difference that was measured, as a share of the largest value."""
    allowed: float | None = None
    """The difference that rounding may make: by the model's dtype, and by what the base itself shows."""

    @property
    def text(self) -> str:
        """The cell of the table: the outcome, and the difference where one was measured."""
        short = "-" if self.outcome == "not applicable" else self.outcome
        return short if self.difference is None else f"{short} {self.difference:.0e}"


@dataclass(frozen=True)
class ModelCheck:
    """Methods x laws on one model. Prints as a table, with a line below it for every refusal, fault and remark."""

    model_name: str
    """Class of the model."""
    cells: Mapping[tuple[str, Column], CheckCell]
    """By method, as the table names it, and column."""
    notes: tuple[str, ...] = ()
    """What the base by itself allows to compare: padding, rows that depend on each other, ways of using a cache."""

    @property
    def ok(self) -> bool:
        """No cell is wrong or an error. A refusal is no failure: it is what kitout does where it cannot be exact."""
        return not any(cell.outcome in FAILURES for cell in self.cells.values())

    @property
    def methods(self) -> list[str]:
        """The names of the rows."""
        return list(dict.fromkeys(method for method, _ in self.cells))

    @property
    def columns(self) -> list[Column]:
        """The columns that were asked for, in the order of `COLUMNS`."""
        asked = {column for _, column in self.cells}
        return [column for column in COLUMNS if column in asked]

    def __str__(self) -> str:
        rows: Sequence[tuple[str, ...]] = [
            (method, *(self.cells[method, column].text for column in self.columns)) for method in self.methods
        ]
        lines = [self.model_name, *align_columns([("method", *self.columns), *rows])]
        for (method, column), cell in self.cells.items():
            if cell.message and cell.outcome != "not applicable":
                lines.append(f"{method}, {column}: {cell.outcome}: {single_line(cell.message, 600)}")
        return "\n".join([*lines, *self.notes])
