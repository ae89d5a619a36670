"""Marked stretches of a text as words with tags: B- on the first word of a stretch, I- on the others, O elsewhere.

Words are runs of letters and digits, and single other signs; a stretch that begins or ends inside a word takes the
whole word. It knows no file, no row and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from kitout.data.read.tables import DataError

_WORD = re.compile(r"\w+|[^\w\s]")


def words_and_tags(text: str, marked: Sequence[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """marked: objects with start, end (characters, end excluded) and label."""
    stretches = sorted((_stretch(m, text) for m in marked), key=lambda s: s[:2])
    for (_, end, one), (start, _, other) in pairwise(stretches):
        if start < end:
            raise DataError(f"the spans {one!r} and {other!r} overlap at character {start}; a word has one tag")
    words = list(_WORD.finditer(text))
    tags = ["O"] * len(words)
    for start, end, label in stretches:
        inside = [i for i, w in enumerate(words) if w.start() < end and w.end() > start]
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{label}"
    return tuple(w.group() for w in words), tuple(tags)


def _stretch(mark: Any, text: str) -> tuple[int, int, str]:
    if not isinstance(mark, Mapping):
        raise DataError(f"a span is {mark!r}, expected an object with start, end and label")
    start, end = mark.get("start"), mark.get("end")
    label = next((mark[k] for k in ("label", "entity", "type", "tag") if mark.get(k) is not None), None)
    if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end <= len(text) or label is None:
        raise DataError(f"a span is {dict(mark)}; expected 0 <= start < end <= {len(text)} and a label")
    if not text[start:end].strip():
        raise DataError(f"the span {dict(mark)} marks nothing but white space")
    return start, end, str(label)
