"""Examples encoded for models that classify: one class, several labels, a number, or a tag for every token.

The set of labels comes from the train split, or is given, and is closed: any other label is an error with its line.
Encoders tokenize in batches and truncate the end of the text. It knows no file, no model and no padding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from kitout.data.encode.generation import encode_each
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.encode.spans_to_labels import SpanTokenizer
from kitout.data.examples.examples import Example, LabeledText, TaggedWords, cell_to_text
from kitout.data.read.tables import DataError
from kitout.errors import suggest
from kitout.format import short_repr

WORDS_WITHOUT_TOKENS = "a word has no token of its own, so its tag is not trained on"
WHOLE_NUMBER_PATTERN = re.compile(r"-?\d{1,300}")  # Python reads no more than 4,300 digits
MAX_LABELS = 1000  # more different labels are probably the wrong column


def label_set(examples: Iterable[Example]) -> tuple[str, ...]:
    """The labels, or tags, of these examples, sorted: as numbers if all are whole numbers; O comes first."""
    labels: set[str] = set()
    for example in examples:
        if isinstance(example, TaggedWords):
            labels.update(example.tags)
        elif isinstance(example, LabeledText):
            labels.update(example.label if isinstance(example.label, tuple) else (cell_to_text(example.label),))
    if len(labels) > MAX_LABELS:
        first = ", ".join(short_repr(label, 40) for label in sorted(labels)[:4])
        raise DataError(
            f"{len(labels)} different labels ({first}, ...), expected at most {MAX_LABELS}: is it the right column?"
        )
    if all(WHOLE_NUMBER_PATTERN.fullmatch(label) for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels, key=lambda label: (label != "O", label)))


@dataclass(frozen=True)
class _LabelEncoder:
    """What the encoders of labeled texts have in common."""

    tokenizer: Any
    """A tokenizer of transformers."""
    max_length: int
    """Of an encoded example, in tokens; of a pair the longer text is truncated."""

    def _encode(self, examples: Sequence[Example], values: Sequence[Any]) -> list[EncodedExample]:
        labeled = [e for e in examples if isinstance(e, LabeledText)]
        encoded = encode_texts(
            self.tokenizer, [e.text for e in labeled], [e.text_pair for e in labeled], self.max_length
        )
        return [
            EncodedExample(
                ids, label=value, reference=e.answer_text(), num_truncated=cut, location=e.location, group=e.group
            )
            for e, value, (ids, cut) in zip(labeled, values, encoded, strict=True)
        ]


@dataclass(frozen=True)
class ClassEncoder(_LabelEncoder):
    """One class of `labels`; the value is its index."""

    labels: tuple[str, ...]
    """The classes, in order."""

    def __post_init__(self) -> None:
        _check_num_labels(self.labels)

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        label_ids = {label: i for i, label in enumerate(self.labels)}
        return self._encode(examples, encode_each(examples, lambda e: _label_id(_single_label(e), label_ids)))


@dataclass(frozen=True)
class MultiLabelEncoder(_LabelEncoder):
    """Any number of `labels`; the value has 1.0 for each that applies, else 0.0."""

    labels: tuple[str, ...]
    """All labels, in order."""

    def __post_init__(self) -> None:
        _check_num_labels(self.labels)

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        label_ids = {label: i for i, label in enumerate(self.labels)}

        def to_vector(example: Example) -> tuple[float, ...]:
            label = _require_label(example).label
            names = label if isinstance(label, tuple) else (cell_to_text(label),)
            applying = {_label_id(name, label_ids) for name in names}
            return tuple(float(i in applying) for i in range(len(label_ids)))

        return self._encode(examples, encode_each(examples, to_vector))


@dataclass(frozen=True)
class RegressionEncoder(_LabelEncoder):
    """A number; the value is that number."""

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        return self._encode(examples, encode_each(examples, _to_number))


@dataclass(frozen=True)
class TokenClassEncoder:
    """One of `labels` for every word: trained on the word's first token, the others are ignored.

    The text is tokenized as it stands, spaces included, and offsets say which token is whose: words handed over one by
    one lose the spaces between them in byte-level vocabularies.
    """

    tokenizer: Any
    """A fast tokenizer of transformers."""
    max_length: int
    """Of an encoded example, in tokens."""
    labels: tuple[str, ...]
    """The tags, in order."""

    def __post_init__(self) -> None:
        _check_num_labels(self.labels)

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        label_ids = {label: i for i, label in enumerate(self.labels)}
        SpanTokenizer(self.tokenizer)  # offsets need a fast tokenizer
        tags = encode_each(examples, lambda e: [_label_id(tag, label_ids) for tag in _require_tags(e).tags])
        if not examples:
            return []
        located = [e.located_words() for e in examples if isinstance(e, TaggedWords)]
        short = self._tokenize([text for text, _ in located], truncation=True, max_length=self.max_length)
        encoded = []
        for i, (example, tag_ids, (text, words)) in enumerate(zip(examples, tags, located, strict=True)):
            ids = short["input_ids"][i]
            first_tokens = _first_tokens(words, short["offset_mapping"][i])
            full_length, num_words = len(ids), len(first_tokens)
            if len(ids) >= self.max_length:
                full = self._tokenize([text])
                full_length = len(full["input_ids"][0])
                num_words = len(_first_tokens(words, full["offset_mapping"][0]))
            labels = [IGNORE_INDEX] * len(ids)
            for word, token in first_tokens.items():
                labels[token] = tag_ids[word]
            encoded.append(
                EncodedExample(
                    tuple(ids),
                    tuple(labels),
                    reference=example.answer_text(),
                    num_truncated=full_length - len(ids),
                    num_truncated_targets=num_words - len(first_tokens),
                    location=example.location,
                    remarks=(WORDS_WITHOUT_TOKENS,) if num_words < len(words) else (),
                    group=example.group,
                )
            )
        return encoded

    def first_tokens(self, example: TaggedWords) -> dict[int, int]:
        """Word -> the token whose class is the word's; words behind the limit, and those without a token, have none."""
        text, words = example.located_words()
        encoding = self._tokenize([text], truncation=True, max_length=self.max_length)
        return _first_tokens(words, encoding["offset_mapping"][0])

    def _tokenize(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False, **options)


def _first_tokens(words: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Word -> its first token. A token of several words is that of the first of them that has none yet."""
    first_tokens: dict[int, int] = {}
    word = 0
    for token, (start, end) in enumerate(offsets):
        if start == end:  # a special token, or white space alone
            continue
        while word < len(words) and words[word][1] <= start:
            word += 1
        covered = takewhile(lambda i: words[i][0] < end, range(word, len(words)))  # noqa: B023 - used at once
        owner = next((i for i in covered if i not in first_tokens), None)
        if owner is not None:
            first_tokens[owner] = token
    return first_tokens


def encode_texts(
    tokenizer: Any, texts: Sequence[str], text_pairs: Sequence[str | None], max_length: int
) -> list[tuple[tuple[int, ...], int]]:
    """Ids of each text, or pair of texts, of at most `max_length` tokens, and how many tokens were truncated."""
    encoded: list[tuple[tuple[int, ...], int]] = []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    pairs = zip(texts, text_pairs, strict=True)
    for is_single, group in groupby(pairs, key=lambda pair: pair[1] is None):  # a batch has pairs or none
        batch = list(group)
        columns = [[text for text, _ in batch]]
        if not is_single:
            columns.append([str(second) for _, second in batch])
        short = tokenizer(*columns, truncation=True, max_length=max_length, **options)["input_ids"]
        at_limit = [i for i, ids in enumerate(short) if len(ids) >= max_length]
        lengths = {}
        if at_limit:
            full = tokenizer(*[[column[i] for i in at_limit] for column in columns], **options)["input_ids"]
            lengths = {i: len(ids) for i, ids in zip(at_limit, full, strict=True)}
        encoded += [(tuple(ids), lengths.get(i, len(ids)) - len(ids)) for i, ids in enumerate(short)]
    return encoded


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
        raise DataError(f"it has the labels {list(label)}; for several labels at once train multilabel")
    return cell_to_text(label)


def _to_number(example: Example) -> float:
    label = _require_label(example).label
    try:
        value = float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"label {short_repr(label)} is not a finite number")
    return value


def _label_id(label: str, label_ids: dict[str, int]) -> int:
    if label not in label_ids:
        raise DataError(f"label {short_repr(label)} is not in the set; {suggest(label, label_ids)}")
    return label_ids[label]


def _check_num_labels(labels: Sequence[str]) -> None:
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(
            f"the labels are {', '.join(labels) or 'none'}; at least two different ones are needed "
            "(are the rows sorted by label? data.train.limit samples them, `path#500` takes the first)"
        )
