"""A page of tables: titles, sentences and rows in one file, in the style of a run's report, on paper and on phones.

Used by `kitout eval --out`. Every text is escaped, because data are written by strangers. It knows no set and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from kitout.evaluate.report.html import template


@dataclass(frozen=True)
class TableSection:
    """One part of the page."""

    title: str
    """Its heading."""
    rows: Sequence[Sequence[str]] = ()
    """The table, its head first; empty: none."""
    lines: Sequence[str] = ()
    """Sentences before it."""


def render_tables(title: str, sections: Sequence[TableSection]) -> str:
    """The page."""
    return str(_load_template().render(title=title, sections=sections))


@cache
def _load_template() -> Any:
    return template(files(__package__).joinpath("assessment.html").read_text(encoding="utf-8"))
