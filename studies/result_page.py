"""Parts of a page that studies write, each between two marks: what else is on the page stays as it is.

A study writes the parts that it has finished, so a part that was run elsewhere is not lost. It knows no study.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kitout.files.atomic import write_text

BEGIN, END = "<!-- results: {part} -->", "<!-- end of {part} -->"


def write_part(page: Path, part: str, lines: Sequence[str]) -> None:
    """Replaces what is between the marks of this part; ValueError where the page has none."""
    begin, end = BEGIN.format(part=part), END.format(part=part)
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{page} has no place for this part: write {begin} and {end} where it belongs")
    before, rest = text.split(begin)
    write_text(page, "\n".join([f"{before}{begin}", "", *lines, f"{end}{rest.split(end)[1]}"]))
