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

_WORD_PATTERN = re.compile(r"\w+|[^\w\s]")


def bio_tags(text: str, spans: Sequence[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """marked: objects with start, end (characters, end excluded) and label."""
    stretches = sorted((_check_span(m, text) for m in spans), key=lambda s: s[:2])
    for (_, end, one), (start, _, other) in pairwise(stretches):
        if start < end:
            raise DataError(f"the spans {one!r} and {other!r} overlap at character {start}; a word has one tag")
    words = list(_WORD_PATTERN.finditer(text))
    tags = ["O"] * len(words)
    for start, end, label in stretches:
        inside = [i for i, w in enumerate(words) if w.start() < end and w.end() > start]
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{label}"
    return tuple(w.group() for w in words), tuple(tags)


def _check_span(span: Any, text: str) -> tuple[int, int, str]:
    if not isinstance(span, Mapping):
        raise DataError(f"a span is {span!r}, expected an object with start, end and label")
    start, end = span.get("start"), span.get("end")
    label = next((span[k] for k in ("label", "entity", "type", "tag") if span.get(k) is not None), None)
    if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end <= len(text) or label is None:
        raise DataError(f"a span is {dict(span)}; expected 0 <= start < end <= {len(text)} and a label")
    if not text[start:end].strip():
        raise DataError(f"the span {dict(span)} marks nothing but white space")
    return start, end, str(label)
