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

from kitout.data.encode.generation import encode_each
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.encode.spans_to_labels import SpanTokenizer
from kitout.data.examples.examples import Example, LabeledText, TaggedWords, cell_to_text
from kitout.data.read.tables import DataError
from kitout.errors import suggest

MAX_LABELS = 1000  # classes; more are no classes but probably the wrong column


def label_set(examples: Iterable[Example]) -> tuple[str, ...]:
    """The labels, or tags, of these examples: whole numbers in their order, words in theirs, tags with O first."""
    found: set[str] = set()
    for example in examples:
        if isinstance(example, TaggedWords):
            found.update(example.tags)
        elif isinstance(example, LabeledText):
            found.update(example.label if isinstance(example.label, tuple) else (cell_to_text(example.label),))
    if len(found) > MAX_LABELS:
        some = ", ".join(map(repr, sorted(found)[:4]))
        raise DataError(
            f"{len(found)} different labels ({some}, ...), expected at most {MAX_LABELS}: is it the right column?"
        )
    if all(label.lstrip("-").isdecimal() for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found, key=lambda label: (label != "O", label)))


@dataclass(frozen=True)
class _LabelEncoder:
    tokenizer: Any
    max_length: int

    def _encode_texts(self, examples: Sequence[LabeledText]) -> list[tuple[tuple[int, ...], int]]:
        """Ids with the tokenizer's special tokens and how many tokens were cut; of two texts the longer is cut."""
        return encode_texts(
            self.tokenizer, [e.text for e in examples], [e.text_pair for e in examples], self.max_length
        )

    def _to_encoded(self, examples: Sequence[Example], labels: Sequence[Any]) -> list[EncodedExample]:
        texts = [e for e in examples if isinstance(e, LabeledText)]
        return [
            EncodedExample(ids, label=value, reference=e.answer_text(), num_truncated=cut, location=e.location)
            for e, value, (ids, cut) in zip(texts, labels, self._encode_texts(texts), strict=True)
        ]


@dataclass(frozen=True)
class ClassEncoder(_LabelEncoder):
    """One class of `labels`; a value is its index."""

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_num_labels(self.labels)

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        known = {label: i for i, label in enumerate(self.labels)}
        return self._to_encoded(examples, encode_each(examples, lambda e: _label_id(_single_label(e), known)))


@dataclass(frozen=True)
class MultiLabelEncoder(_LabelEncoder):
    """Any number of `labels`; a value holds 1.0 for each that applies, else 0.0."""

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_num_labels(self.labels)

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        known = {label: i for i, label in enumerate(self.labels)}

        def value(example: Example) -> tuple[float, ...]:
            label = _require_label(example).label
            held = {_label_id(one, known) for one in (label if isinstance(label, tuple) else (cell_to_text(label),))}
            return tuple(float(i in held) for i in range(len(known)))

        return self._to_encoded(examples, encode_each(examples, value))


@dataclass(frozen=True)
class RegressionEncoder(_LabelEncoder):
    """A number."""

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        return self._to_encoded(examples, encode_each(examples, _to_number))


@dataclass(frozen=True)
class TokenClassEncoder:
    """One of `labels` for every word: learnt on the word's first token, the others are ignored."""

    tokenizer: Any
    max_length: int
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_num_labels(self.labels)

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        known = {label: i for i, label in enumerate(self.labels)}
        SpanTokenizer(self.tokenizer)  # word_ids need a fast tokenizer
        tags = encode_each(examples, lambda e: [_label_id(tag, known) for tag in _require_tags(e).tags])
        if not examples:
            return []
        words = [list(e.words) for e in examples if isinstance(e, TaggedWords)]
        how = {"is_split_into_words": True, "return_attention_mask": False, "verbose": False}
        said = self.tokenizer(words, truncation=True, max_length=self.max_length, **how)
        made = []
        for i, (example, classes, ids) in enumerate(zip(examples, tags, said["input_ids"], strict=True)):
            where = said.word_ids(i)
            firsts = {word: at for at, word in reversed(list(enumerate(where))) if word is not None}
            labels = [IGNORE_INDEX] * len(ids)
            for word, at in firsts.items():
                labels[at] = classes[word]
            full = len(ids)
            if len(ids) >= self.max_length:
                full = len(self.tokenizer(words[i], **how)["input_ids"])
            made.append(
                EncodedExample(
                    tuple(ids),
                    tuple(labels),
                    reference=example.answer_text(),
                    num_truncated=full - len(ids),
                    num_truncated_targets=len(classes) - len(firsts),
                    location=example.location,
                )
            )
        return made


def encode_texts(
    tokenizer: Any, texts: Sequence[str], text_pairs: Sequence[str | None], max_length: int
) -> list[tuple[tuple[int, ...], int]]:
    """Ids of each text, or pair of texts, of at most `most` tokens, and how many tokens were cut."""
    made: list[tuple[tuple[int, ...], int]] = []
    how = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    pairs = zip(texts, text_pairs, strict=True)
    for alone, group in groupby(pairs, key=lambda pair: pair[1] is None):  # a batch has pairs or none
        held = list(group)
        given = [[t for t, _ in held]] if alone else [[t for t, _ in held], [str(s) for _, s in held]]
        short = tokenizer(*given, truncation=True, max_length=max_length, **how)["input_ids"]
        full = [i for i, ids in enumerate(short) if len(ids) >= max_length]
        lengths = {}
        if full:
            whole = tokenizer(*[[column[i] for i in full] for column in given], **how)["input_ids"]
            lengths = {i: len(ids) for i, ids in zip(full, whole, strict=True)}
        made += [(tuple(ids), lengths.get(i, len(ids)) - len(ids)) for i, ids in enumerate(short)]
    return made


def _require_label(example: Example) -> LabeledText:
    if not isinstance(example, LabeledText):
        raise DataError(f"a {type(example).__name__.lower()} example has no label; name the text and the label column")
    return example


def _require_tags(example: Example) -> TaggedWords:
    if not isinstance(example, TaggedWords):
        raise DataError(f"a {type(example).__name__.lower()} example has no tags; name the columns tokens and tags")
    return example


def _single_label(example: Example) -> str:
    label = _require_label(example).label
    if isinstance(label, tuple):
        raise DataError(f"it has the labels {list(label)}; for several labels at once train with multilabel")
    return cell_to_text(label)


def _to_number(example: Example) -> float:
    label = _require_label(example).label
    try:
        value = float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"label {label!r} is no finite number")
    return value


def _label_id(label: str, label_ids: dict[str, int]) -> int:
    if label not in label_ids:
        raise DataError(f"label {label!r} is outside the set; {suggest(label, label_ids)}")
    return label_ids[label]


def _check_num_labels(labels: Sequence[str]) -> None:
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(
            f"the labels are {', '.join(labels) or 'none'}; at least two different ones are needed "
            "(rows in the order of their labels? data.train.limit draws some, `path#500` takes the first)"
        )
