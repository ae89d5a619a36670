"""report.html: what a run did, in one file that opens anywhere and asks nothing of any other machine.

Style and pictures are inside, there is no script, and a policy in the page forbids both scripts and requests. Every
text is escaped: data are written by strangers. It knows a `Summary` and no model.
"""

from __future__ import annotations

import base64
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kitout.evaluate.report.summary import RunSummary, format_fact
from kitout.files.atomic import write_text


def render_html(summary: RunSummary) -> str:
    """The page."""
    return str(_load_template().render(s=summary))


def write_html(summary: RunSummary, file: Path) -> Path:
    """The page in a file."""
    return write_text(file, render_html(summary))


@cache
def _load_template() -> Any:
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"words": format_fact, "base64": _to_base64, "broad": _is_wide}
    return page.from_string(files("kitout.evaluate").joinpath("report.html").read_text(encoding="utf-8"))


def _to_base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _is_wide(picture: bytes) -> bool:
    """Whether a PNG is too broad to be read at the width of a phone: then it is moved sideways."""
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    return width > 2.2 * height
