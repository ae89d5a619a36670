"""report.html: what a run did, in one file that opens anywhere and asks nothing of any other machine.

Style, charts and images are inside the file; its colors follow light and dark mode. There is no script, and a policy in
the page forbids scripts and requests. Every text is escaped, because data are written by strangers. It knows
`RunSummary` and no model.
"""

from __future__ import annotations

import base64
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kitout.evaluate.report.summary import RunSummary, format_fact
from kitout.evaluate.sets.forgetting import forgetting_line, forgetting_rows
from kitout.files.atomic import write_text
from kitout.format import format_bytes


def render_html(summary: RunSummary) -> str:
    """The page."""
    return str(_load_template().render(s=summary))


def write_html(summary: RunSummary, file: Path) -> Path:
    """The page in a file."""
    return write_text(file, render_html(summary))


@cache
def _load_template() -> Any:
    return template(_report_text())


def template(text: str) -> Any:
    """A page of one's own from its text, where `head` and `style` are the report's: its policy forbids scripts."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "fact": format_fact, "base64": _to_base64, "bytes": format_bytes,
        "forgetting_rows": forgetting_rows, "forgetting_line": forgetting_line,
    }  # fmt: skip
    report = _report_text()
    environment.globals["head"] = report.partition("<title>")[0]
    environment.globals["style"] = report.partition("<style>")[2].partition("</style>")[0]
    return environment.from_string(text)


def _report_text() -> str:
    return files(__package__).joinpath("report.html").read_text(encoding="utf-8")


def _to_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()
