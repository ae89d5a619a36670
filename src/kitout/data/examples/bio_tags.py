"""Labeled spans of a text as words with BIO tags: B- on the first word of a span, I- on the others, O elsewhere.

Words are runs of letters and digits, and single other characters; a span that begins or ends inside a word takes the
whole word, and a word that two spans share is refused. It knows no file, no row and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from kitout.data.read.tables import DataError
from kitout.format import short_repr

_WORD_PATTERN = re.compile(r"\w+|[^\w\s]")


def bio_tags(text: str, spans: Sequence[Any]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """Words, their tags, and the character at which each begins.

    spans: objects with start, end (characters, end excluded) and label, or lists of these three.
    """
    checked = sorted((_check_span(span, text) for span in spans), key=lambda span: span[:2])
    for (_, end, label), (start, _, next_label) in pairwise(checked):
        if start < end:
            raise DataError(f"the spans {label!r} and {next_label!r} overlap at character {start}; a word has one tag")
    words = list(_WORD_PATTERN.finditer(text))
    tags = ["O"] * len(words)
    for start, end, label in checked:
        inside = [i for i, word in enumerate(words) if word.start() < end and word.end() > start]
        if tags[inside[0]] != "O":
            word = words[inside[0]].group()
            raise DataError(
                f"the spans {tags[inside[0]][2:]!r} and {label!r} (at character {start}) are both in the word {word!r},"
                " and a word has one tag: put a space between them, or keep one"
            )
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{label}"
    return tuple(word.group() for word in words), tuple(tags), tuple(word.start() for word in words)


def _check_span(span: Any, text: str) -> tuple[int, int, str]:
    if isinstance(span, list | tuple) and len(span) == 3:
        span = dict(zip(("start", "end", "label"), span, strict=True))
    if not isinstance(span, Mapping):
        raise DataError(
            f"a span is {short_repr(span)}, expected an object with start, end and label, or [start, end, label]"
        )
    start, end = span.get("start"), span.get("end")
    label = next((span[key] for key in ("label", "entity", "type", "tag") if span.get(key) is not None), None)
    if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end <= len(text) or label is None:
        raise DataError(f"a span is {short_repr(dict(span))}; expected 0 <= start < end <= {len(text)} and a label")
    if not text[start:end].strip():
        raise DataError(f"the span {short_repr(dict(span))} covers nothing but white space")
    return start, end, str(label)
