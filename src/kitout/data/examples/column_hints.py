"""The line that names the columns of a table: guessed from its rows, written so that it can be pasted behind a command.

A column of text has words that differ from row to row, a column of labels a few values that repeat. A guess is shown
and never taken. It knows no format but by the names of its roles.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

MAX_GUESS_ROWS, MAX_LABELS, MAX_LABEL_CHARS = 500, 50, 40
LABEL_ROLES = ("label", "labels", "tags")
PLAIN_YAML = re.compile(r"[^\W\d][\w .-]*[\w.]|[^\W\d]")
YAML_WORDS = {"true", "false", "null"}


def text_columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Columns whose cells are texts, those with the longest first."""
    lengths = {column: _text_length(_cells(rows, column)) for column in columns}
    return sorted((c for c in columns if lengths[c]), key=lambda c: -lengths[c])


def label_columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Columns whose few values repeat, those with the fewest first."""
    counts = {column: _num_labels(_cells(rows, column)) for column in columns}
    return sorted((c for c in columns if counts[c]), key=lambda c: counts[c])


def naming_line(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], roles: Sequence[str] | None, data_format: str = ""
) -> str:
    """`data.train.columns.text='ticket text' data.train.columns.label=topic`, behind what the columns look like.

    roles: required by the requested format; None: a text with a label, a prompt with an answer, or a text alone.
    """
    rows = rows[:MAX_GUESS_ROWS]
    texts, labels = text_columns(rows, columns), label_columns(rows, columns)
    texts = [c for c in texts if c not in labels] or texts
    labels = [c for c in labels if c not in texts[:1]]
    if roles is None and not labels and len(texts) > 1:
        texts[:2] = sorted(texts[:2], key=columns.index)
        roles = ("prompt", "completion")
    elif roles is None:
        roles = ("text", "label") if labels or not texts else ("text",)
        data_format = data_format if labels or not texts else "text"
    free = [*texts, *(c for c in columns if c not in texts)]
    chosen: dict[str, str] = {}
    for role in sorted(roles, key=lambda role: role not in LABEL_ROLES):
        candidates = [c for c in (labels if role in LABEL_ROLES else []) + free if c not in chosen.values()]
        spare = [c for c in candidates if role in LABEL_ROLES or c not in labels] or candidates
        if role in LABEL_ROLES and not labels:
            spare = spare[::-1]
        chosen[role] = spare[0] if spare else role
    settings = [f"data.train.format={data_format}"] if data_format else []
    settings += [f"data.train.columns.{role}={yaml_text(chosen[role])}" for role in roles]
    looks = [f"{kind}: {', '.join(c[:80] for c in found[:5])}" for kind, found in
             (("text", texts), ("labels", labels)) if found]  # fmt: skip
    seen = f" (they look like {'; '.join(looks)})" if looks else ""
    return f"name them{seen}, e.g.\n    {' '.join(map(shlex.quote, settings))}"


def yaml_text(text: str) -> str:
    """A text as a value of YAML that is read as this text."""
    return (
        text if PLAIN_YAML.fullmatch(text) and text.lower() not in YAML_WORDS else json.dumps(text, ensure_ascii=False)
    )


def _cells(rows: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    return [cell for row in rows if (cell := row.get(column)) not in (None, "")]


def _text_length(cells: Sequence[Any]) -> float:
    """The mean length of texts; 0 for what is none: names, numbers, dates, ids."""
    texts = [cell for cell in cells if isinstance(cell, str)]
    if not texts or len(texts) < len(cells) or 2 * sum(any(c.isalpha() for c in text) for text in texts) < len(texts):
        return 0.0
    has_words = 2 * sum(len(text.split()) > 1 for text in texts) >= len(texts)
    return sum(map(len, texts)) / len(texts) if has_words else 0.0


def _num_labels(cells: Sequence[Any]) -> int:
    """How many labels there are; 0 for what is no column of labels."""
    is_short = all(
        isinstance(cell, bool | int) or (isinstance(cell, str) and len(cell) <= MAX_LABEL_CHARS) for cell in cells
    )
    values = set(map(str, cells)) if is_short else set()
    return len(values) if 1 < len(values) <= min(MAX_LABELS, len(cells) // 2) else 0
