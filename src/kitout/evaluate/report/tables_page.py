"""A page of tables: titles, sentences and rows in one file, in the style of a run's report, on paper and on phones.

Used by `kitout eval --out`. Every text is escaped, because data are written by strangers. It knows no set and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


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
    return str(_load_template().render(title=title, sections=sections, style=_style()))


@cache
def _load_template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files(__package__).joinpath("assessment.html").read_text(encoding="utf-8"))


@cache
def _style() -> str:
    """That of a run's report, which holds it once for both."""
    page = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return page.partition("<style>")[2].partition("</style>")[0]
