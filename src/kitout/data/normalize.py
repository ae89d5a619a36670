"""When two texts count as the same: one function, whose options say what is ignored.

By default case, width of letters and white space are ignored: so duplicates are found. With `words_only` punctuation
and articles are ignored too: so generated answers are compared (Rajpurkar et al. 2016, with signs and decimal points
of numbers kept). It knows no example and no metric.
"""

from __future__ import annotations

import re
import unicodedata

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_PUNCTUATION = re.compile(r"\.(?!\d)|(?<=[^\W\d])\.|(?<=\w)-|-(?!\.?\d)|[!-,/:-@\[-`{-~]")
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
    words = _PUNCTUATION.sub("", _THOUSANDS.sub("", folded))
    return " ".join(word for word in words.split() if word not in _ARTICLES) or folded
