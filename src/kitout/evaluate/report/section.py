"""A section that a kind of run adds to its pages: a table, charts, texts as they changed.

The table is shown on the terminal, in the report and in the card, all else in the report alone. Texts may come from
anywhere: whoever writes a page escapes them. It knows plain values, no run and no page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kitout.evaluate.report.charts import Chart


@dataclass(frozen=True, kw_only=True)
class AnswerOverTime:
    """One answer to a prompt. (The names are keys of results.json.)"""

    step: int
    """The step of the run that it was sampled for."""
    text: str
    """The answer."""
    reward: str
    """What it got, as text."""


@dataclass(frozen=True, kw_only=True)
class PromptOverTime:
    """A prompt with answers to it from several steps."""

    prompt: str
    """The prompt's text."""
    answers: Sequence[AnswerOverTime]
    """In the order of the run."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section."""

    title: str
    """Its heading."""
    table: Sequence[Sequence[str]] = ()
    """Rows of text, headings first; empty: there is none."""
    caption: str = ""
    """What the table shows, in a sentence or two."""
    charts: Sequence[Chart] = ()
    """Side by side."""
    is_printed: bool = True
    """Whether the terminal shows the table at the end of a run."""
    prompts: Sequence[PromptOverTime] = ()
    """Answers as they changed."""

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds: what a terminal shows of it."""
        return {"title": self.title, "table": [list(row) for row in self.table], "caption": self.caption}


@dataclass(frozen=True, kw_only=True)
class RunDetails:
    """What a kind of run adds to what every run writes."""

    values: Mapping[str, Any]
    """For results.json, under its own key."""
    sections: Sequence[Section] = ()
    """Of its pages."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG by name, for the folder; one of a usual name takes its place."""
    alarms: Sequence[str] = ()
    """What went wrong while it trained, with what to write."""
