"""The fenced blocks of a page, for tests that run what a page says.

It reads Markdown as far as fences go and knows nothing of what pages say.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

FENCE = re.compile(r"^(?P<indent> *)```(?P<tag>\w*).*$")
SKIP = re.compile(r"^\s*<!--\s*skip:\s*(?P<why>.*?)\s*-->\s*$")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    line: int
    """Of its first line of code, counted from 1."""
    tag: str
    """The word behind the fence."""
    code: str
    """Its lines, without the indent of the fence."""
    skip: str | None
    """Why it is not run, from a comment on the line above; None: it is run."""


def blocks(text: str, tags: tuple[str, ...] = ("python", "py")) -> Iterator[Block]:
    """The blocks of a page with one of these tags, in order; fences may be indented (inside lists)."""
    lines = text.splitlines()
    start, tag = 0, ""
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if not fence:
            continue
        if not start:
            start, tag = number, fence["tag"]
            continue
        if tag in tags:
            above = SKIP.match(lines[start - 2]) if start > 1 else None
            code = textwrap.dedent("\n".join(lines[start : number - 1]))
            yield Block(start + 1, tag, code, above["why"] if above else None)
        start = 0
