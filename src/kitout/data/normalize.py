"""When two texts count as the same: one function, whose options say what is ignored.

By default case, width of letters and white space are ignored: so duplicates are found. With `words_only` articles and
the punctuation of every script are ignored too: so generated answers are compared (Rajpurkar et al. 2016, but signs and
decimal points of numbers are kept). It knows no example and no metric.
"""

from __future__ import annotations

import re
import unicodedata

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_PUNCTUATION = re.compile(r"\.(?!\d)|(?<=[^\W\d])\.|(?<=\w)-|-(?!\.?\d)|[!-,/:-@\[-`{-~]")
_DECIMAL_POINTS = "\u066b\uff0e"  # Arabic, full width
_ARTICLES = ("a", "an", "the")


def normalize_text(text: str, *, fold_unicode: bool = True, words_only: bool = False) -> str:
    """The text in lower case with single spaces.

    fold_unicode: NFKC and casefold, so that full-width forms and "ß" count as "A" and "ss"; else lower() alone.
    words_only: without punctuation and articles; a text that would become empty ("A", "+", "!") keeps them.
    """
    folded = unicodedata.normalize("NFKC", text).casefold() if fold_unicode else text.lower()
    folded = " ".join(folded.split())
    if not words_only:
        return folded
    words = _PUNCTUATION.sub("", _THOUSANDS.sub("", _without_unicode_punctuation(folded)))
    return " ".join(word for word in words.split() if word not in _ARTICLES) or folded


def _without_unicode_punctuation(text: str) -> str:
    """Without that beyond ASCII; points between digits stay."""
    if text.isascii():
        return text
    return "".join(
        c
        for i, c in enumerate(text)
        if c.isascii()
        or unicodedata.category(c)[0] != "P"
        or (c in _DECIMAL_POINTS and text[i - 1 : i].isdigit() and text[i + 1 : i + 2].isdigit())
    )
