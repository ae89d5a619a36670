"""Which texts have no spaces between words, and what their units are then: characters.

Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without; Korean has spaces. A text counts as one or the
other by the majority of its letters, one without letters as the texts beside it. In a text without spaces each of these
scripts' characters is a unit, and a run of other letters or digits is one, as a word is. It knows no metric.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

# Letters, marks and digits; of each script the punctuation between them is left out.
_KANA = "\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_SOUTHEAST = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0ece\u0ed0-\u0ed9\u0edc-\u0edf\u1000-\u1049\u1050-\u109f"
    "\u1780-\u17d3\u17d7\u17dc\u17dd\u17e0-\u17e9"
)
_CHARACTER = re.compile(f"[{_HAN}{_KANA}{_SOUTHEAST}]")
_HAN_OR_KANA, _KANA_ONLY = re.compile(f"[{_HAN}{_KANA}]"), re.compile(f"[{_KANA}]")
_UNIT = re.compile(f"[{_HAN}{_KANA}{_SOUTHEAST}]|[^\\W_{_HAN}{_KANA}{_SOUTHEAST}]+")
MIN_KANA = 0.1  # of the characters of Chinese or Japanese texts: from here on they are Japanese


def split_units(text: str) -> list[str]:
    """The units of a text without spaces; punctuation is none."""
    return _UNIT.findall(text)


def lacks_spaces(texts: Sequence[str]) -> list[bool]:
    """Of each text whether it is written without spaces between words."""
    counts = [_count_letters(text) for text in texts]
    of_all = sum(unspaced for unspaced, _ in counts) > sum(spaced for _, spaced in counts)
    return [unspaced > spaced if unspaced + spaced else of_all for unspaced, spaced in counts]


def bleu_tokenizer(texts: Sequence[str]) -> str:
    """sacrebleu's name of the tokenizer for these references: "13a", its default, where words have spaces.

    "zh" for Chinese; "ja-mecab" for Japanese where its packages are installed; else "char".
    """
    text = "".join(texts)
    unspaced, spaced = _count_letters(text)
    if unspaced <= spaced:
        return "13a"
    east = len(_HAN_OR_KANA.findall(text))
    if 2 * east <= unspaced:
        return "char"
    if len(_KANA_ONLY.findall(text)) < MIN_KANA * east:
        return "zh"
    return "ja-mecab" if find_spec("MeCab") is not None and find_spec("ipadic") is not None else "char"


def _count_letters(text: str) -> tuple[int, int]:
    """(characters of scripts without spaces, other letters)."""
    unspaced = len(_CHARACTER.findall(text))
    return unspaced, sum(c.isalpha() for c in _CHARACTER.sub("", text))
