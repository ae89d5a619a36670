"""Examples as the items of models that judge: one class, several labels, a number, or a tag for every token.

The set of labels comes from what is trained on, or is given, and is closed: any other label is told with its line.
Encoders tokenise in batches and cut at the end of the text. It knows no file, no model and no padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kitout.data.encode.generation import collected
from kitout.data.encode.item import IGNORED, Item
from kitout.data.encode.spans_to_labels import Words
from kitout.data.examples.examples import Example, Labelled, Tagged, shown
from kitout.data.read.tables import DataError
from kitout.errors import suggest

MOST = 1000  # classes; more are no classes but probably the wrong column


def label_set(examples: Iterable[Example]) -> tuple[str, ...]:
    """The labels, or tags, of these examples: whole numbers in their order, words in theirs, tags with O first."""
    found: set[str] = set()
    for example in examples:
        if isinstance(example, Tagged):
            found.update(example.tags)
        elif isinstance(example, Labelled):
            found.update(example.label if isinstance(example.label, tuple) else (shown(example.label),))
    if len(found) > MOST:
        some = ", ".join(map(repr, sorted(found)[:4]))
        raise DataError(
            f"{len(found)} different labels ({some}, ...), expected at most {MOST}: is it the right column?"
        )
    if all(label.lstrip("-").isdecimal() for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found, key=lambda label: (label != "O", label)))


@dataclass(frozen=True)
class _Judge:
    tokenizer: Any
    max_length: int

    def _encoded(self, examples: Sequence[Labelled]) -> list[tuple[tuple[int, ...], int]]:
        """Ids with the tokenizer's special tokens and how many tokens were cut; of two texts the longer is cut."""
        return encoded(self.tokenizer, [e.text for e in examples], [e.second for e in examples], self.max_length)

    def _items(self, examples: Sequence[Example], values: Sequence[Any]) -> list[Item]:
        texts = [e for e in examples if isinstance(e, Labelled)]
        return [
            Item(ids, value=value, reference=e.answer_text(), cut=cut, place=e.place)
            for e, value, (ids, cut) in zip(texts, values, self._encoded(texts), strict=True)
        ]


@dataclass(frozen=True)
class Classify(_Judge):
    """One class of `labels`; a value is its index."""

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _at_least_two(self.labels)

    def __call__(self, examples: Sequence[Example]) -> list[Item]:
        known = {label: i for i, label in enumerate(self.labels)}
        return self._items(examples, collected(examples, lambda e: _index(_one(e), known)))


@dataclass(frozen=True)
class MultiLabel(_Judge):
    """Any number of `labels`; a value holds 1.0 for each that applies, else 0.0."""

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _at_least_two(self.labels)

    def __call__(self, examples: Sequence[Example]) -> list[Item]:
        known = {label: i for i, label in enumerate(self.labels)}

        def value(example: Example) -> tuple[float, ...]:
            label = _labelled(example).label
            held = {_index(one, known) for one in (label if isinstance(label, tuple) else (shown(label),))}
            return tuple(float(i in held) for i in range(len(known)))

        return self._items(examples, collected(examples, value))


@dataclass(frozen=True)
class Regress(_Judge):
    """A number."""

    def __call__(self, examples: Sequence[Example]) -> list[Item]:
        return self._items(examples, collected(examples, _number))


@dataclass(frozen=True)
class TagTokens:
    """One of `labels` for every word: learnt on the word's first token, the others are ignored."""

    tokenizer: Any
    max_length: int
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _at_least_two(self.labels)

    def __call__(self, examples: Sequence[Example]) -> list[Item]:
        known = {label: i for i, label in enumerate(self.labels)}
        Words(self.tokenizer)  # word_ids need a fast tokenizer
        tags = collected(examples, lambda e: [_index(tag, known) for tag in _tagged(e).tags])
        if not examples:
            return []
        words = [list(e.words) for e in examples if isinstance(e, Tagged)]
        how = {"is_split_into_words": True, "return_attention_mask": False, "verbose": False}
        said = self.tokenizer(words, truncation=True, max_length=self.max_length, **how)
        made = []
        for i, (example, classes, ids) in enumerate(zip(examples, tags, said["input_ids"], strict=True)):
            where = said.word_ids(i)
            firsts = {word: at for at, word in reversed(list(enumerate(where))) if word is not None}
            labels = [IGNORED] * len(ids)
            for word, at in firsts.items():
                labels[at] = classes[word]
            full = len(ids)
            if len(ids) >= self.max_length:
                full = len(self.tokenizer(words[i], **how)["input_ids"])
            made.append(
                Item(
                    tuple(ids),
                    tuple(labels),
                    reference=example.answer_text(),
                    cut=full - len(ids),
                    lost=len(classes) - len(firsts),
                    place=example.place,
                )
            )
        return made


def encoded(
    tokenizer: Any, texts: Sequence[str], seconds: Sequence[str | None], most: int
) -> list[tuple[tuple[int, ...], int]]:
    """Ids of each text, or pair of texts, of at most `most` tokens, and how many tokens were cut."""
    made: list[tuple[tuple[int, ...], int]] = []
    how = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    pairs = zip(texts, seconds, strict=True)
    for alone, group in groupby(pairs, key=lambda pair: pair[1] is None):  # a batch has pairs or none
        held = list(group)
        given = [[t for t, _ in held]] if alone else [[t for t, _ in held], [str(s) for _, s in held]]
        short = tokenizer(*given, truncation=True, max_length=most, **how)["input_ids"]
        full = [i for i, ids in enumerate(short) if len(ids) >= most]
        lengths = {}
        if full:
            whole = tokenizer(*[[column[i] for i in full] for column in given], **how)["input_ids"]
            lengths = {i: len(ids) for i, ids in zip(full, whole, strict=True)}
        made += [(tuple(ids), lengths.get(i, len(ids)) - len(ids)) for i, ids in enumerate(short)]
    return made


def _labelled(example: Example) -> Labelled:
    if not isinstance(example, Labelled):
        raise DataError(f"a {type(example).__name__.lower()} example has no label; name the text and the label column")
    return example


def _tagged(example: Example) -> Tagged:
    if not isinstance(example, Tagged):
        raise DataError(f"a {type(example).__name__.lower()} example has no tags; name the columns tokens and tags")
    return example


def _one(example: Example) -> str:
    label = _labelled(example).label
    if isinstance(label, tuple):
        raise DataError(f"it has the labels {list(label)}; for several labels at once train with multilabel")
    return shown(label)


def _number(example: Example) -> float:
    label = _labelled(example).label
    try:
        value = float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"label {label!r} is no finite number")
    return value


def _index(label: str, known: dict[str, int]) -> int:
    if label not in known:
        raise DataError(f"label {label!r} is outside the set; {suggest(label, known)}")
    return known[label]


def _at_least_two(labels: Sequence[str]) -> None:
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(
            f"the labels are {', '.join(labels) or 'none'}; at least two different ones are needed "
            "(rows in the order of their labels? data.train.limit draws some, `path#500` takes the first)"
        )
