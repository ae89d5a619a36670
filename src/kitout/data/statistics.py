"""Statistics of the data before training: lengths, label counts, and how many tokens are trained on.

Counted over all examples, never over a sample. Data without trained tokens are an error that says why; what looks wrong
is a warning. It knows no file format and no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kitout.data.answer_statistics import (
    AnswerLengths,
    answer_lengths,
    find_answer_errors,
    find_answer_warnings,
    label_counts,
    rows_of,
)
from kitout.data.encode.item import IGNORE_INDEX, AnyItem, EncodedExample, EncodedPrompt
from kitout.data.read.tables import DataError
from kitout.data.suspicions import warn_of_labels, warn_of_remarks
from kitout.errors import Errors
from kitout.format import common_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
MAX_BINS = 12
MIN_TRAINED_PERCENT, MAX_TRAINED_PERCENT = 5.0, 95.0  # outside of them a warning


@dataclass(frozen=True)
class SplitStatistics:
    """One split of the data. The field names are keys of preflight.json."""

    name: str
    """train, validation or test."""
    num_examples: int
    """All of them."""
    num_tokens: int
    """Tokens a model works through, targets included."""
    num_targets: int
    """Trained tokens: those the loss is taken over; 0 where a whole example has one value."""
    trained_percent: float | None
    """Trained tokens as a percentage of all tokens; None where examples have values."""
    quantiles: tuple[int, ...]
    """Of the lengths, by QUANTILES."""
    histogram: tuple[tuple[int, int, int], ...]
    """Of the lengths: (first, last, examples) of each bin, both ends included."""
    max_length: int
    """Tokens of the longest example."""
    longest_location: str
    """Where the longest example was read."""
    num_truncated: int
    """Examples that truncation shortened."""
    num_truncated_tokens: int
    """Tokens that truncation took from all of them."""
    num_truncated_targets: int
    """Examples whose answer lost tokens to truncation."""
    num_without_targets: int
    """Examples without any trained token."""
    label_counts: Mapping[str, int]
    """Examples (or tokens) of each class."""
    value_range: tuple[float, float, float] | None
    """Minimum, mean and maximum of regression values."""
    num_dropped: int = 0
    """Examples that were left out because they do not fit; not counted above."""


@dataclass(frozen=True)
class DataStatistics:
    """All splits together. The field names are keys of preflight.json."""

    splits: tuple[SplitStatistics, ...]
    """Those that have examples, train first."""
    trained_percent: float | None
    """Trained tokens of all splits as a percentage of their tokens; None where examples have values."""
    warnings: tuple[str, ...]
    """What looks wrong, one sentence each."""
    answers: tuple[AnswerLengths, ...] = ()
    """Of preference data: the answers of the train split by what they are."""

    def __getitem__(self, name: str) -> SplitStatistics:
        return next(split for split in self.splits if split.name == name)

    @property
    def train(self) -> SplitStatistics:
        return self.splits[0]


def compute_statistics(
    splits: Mapping[str, Sequence[AnyItem]], label_names: Sequence[str] = (), closed: bool = False,
    at_model_limit: bool = False, num_dropped: Mapping[str, int] | None = None,
) -> DataStatistics:  # fmt: skip
    """Of {"train": items, "validation": items, ...}; empty splits are left out, but train must not be empty.

    label_names: of the classes, in order. closed: the answers are labels, and short by nature.
    at_model_limit: what was truncated is more than the model reads. num_dropped: by split, examples that were left out.
    Of pairs and judged answers the lengths are those of each answer with its prompt.
    Raises DataError if a split has no trained tokens, or judged answers are all alike.
    """
    if not splits.get("train"):
        raise DataError("the train split has no examples")
    dropped = num_dropped or {}
    statistics = tuple(
        replace(_compute_split(name, items, label_names), num_dropped=dropped.get(name, 0))
        for name, items in splits.items()
        if len(items)
    )
    errors = Errors(DataError, "there is nothing to train on")
    for split in statistics:
        if split.num_without_targets == split.num_examples:
            errors.add(_no_targets_message(split, at_model_limit))
    for message in find_answer_errors(splits["train"]):
        errors.add(message)
    errors.raise_if_any()
    num_tokens = sum(split.num_tokens for split in statistics if split.trained_percent is not None)
    num_targets = sum(split.num_targets for split in statistics)
    percent = 100 * num_targets / num_tokens if num_tokens else None
    plain = [item for item in splits["train"] if isinstance(item, EncodedExample)]
    answers = Counter(item.reference for item in plain) if closed else {}
    warnings = (
        *_find_warnings(statistics, percent, closed, at_model_limit),
        *_warn_same_answer(plain),
        *find_answer_warnings(splits),
        *warn_of_labels(statistics[0].label_counts or answers, statistics[0].trained_percent is None or closed),
        *(warning for name, items in splits.items() for warning in warn_of_remarks(name, items)),
    )
    return DataStatistics(statistics, percent, warnings, answer_lengths(splits["train"], _compute_histogram))


def _compute_split(name: str, items: Sequence[AnyItem], label_names: Sequence[str]) -> SplitStatistics:
    rows = [row for item in items for row in rows_of(item)]
    lengths = sorted(row.length for row in rows)
    longest = max(rows, key=lambda row: row.length)
    are_prompts = isinstance(items[0], EncodedPrompt)
    has_values = rows[0].label is not None or are_prompts
    num_tokens, num_targets = sum(lengths), 0 if has_values else sum(row.num_targets for row in rows)
    values = [float(row.label) for row in rows if isinstance(row.label, float)] if not label_names else []
    return SplitStatistics(
        name=name,
        num_examples=len(items),
        num_tokens=num_tokens,
        num_targets=num_targets,
        trained_percent=None if has_values or not num_tokens else 100 * num_targets / num_tokens,
        quantiles=tuple(lengths[round(q * (len(lengths) - 1))] for q in QUANTILES),
        histogram=_compute_histogram(lengths, lengths[0], lengths[-1]),
        max_length=longest.length,
        longest_location=longest.location,
        num_truncated=sum(any(row.num_truncated for row in rows_of(item)) for item in items),
        num_truncated_tokens=sum(row.num_truncated for row in rows),
        num_truncated_targets=sum(row.num_truncated_targets > 0 for row in rows),
        num_without_targets=0 if are_prompts else sum(item.num_targets == 0 for item in items),
        label_counts=_count_labels(rows, label_names) or label_counts(items),
        value_range=(min(values), sum(values) / len(values), max(values)) if values else None,
    )


def _compute_histogram(lengths: Sequence[int], shortest: int, longest: int) -> tuple[tuple[int, int, int], ...]:
    """Bins of equal, round width from the shortest to the longest length: at most MAX_BINS."""
    if longest == 0:
        return ()
    width = next(w for power in range(9) for w in (10**power, 2 * 10**power, 5 * 10**power)
                 if longest // w - shortest // w < MAX_BINS)  # fmt: skip
    counts = Counter(length // width for length in lengths)
    return tuple((i * width, (i + 1) * width - 1, counts[i]) for i in range(shortest // width, longest // width + 1))


def _count_labels(items: Sequence[EncodedExample], label_names: Sequence[str]) -> dict[str, int]:
    """By class, every class of the names: of sequences, of several at once, or of tokens."""
    if not label_names:
        return {}
    counts: Counter[int] = Counter()
    for item in items:
        if isinstance(item.label, tuple):
            counts.update(i for i, applies in enumerate(item.label) if applies)
        elif item.label is not None:
            counts[int(item.label)] += 1
        else:
            counts.update(label for label in item.labels if label != IGNORE_INDEX)
    return {name: counts[i] for i, name in enumerate(label_names)}


def _no_targets_message(split: SplitStatistics, at_model_limit: bool) -> str:
    """Why the split has no trained tokens, and what to do."""
    if split.num_truncated_targets:
        return (
            f"{split.name}: truncation took the answer of {split.num_truncated_targets:,} of "
            f"{split.num_examples:,} examples (the longest have {split.max_length:,} tokens left and lost "
            f"{split.num_truncated_tokens:,} in all): "
            + ("the model reads no more; shorten the texts" if at_model_limit else "choose a larger data.max_length")
        )
    return (
        f"{split.name}: none of the {split.num_tokens:,} tokens in {split.num_examples:,} examples is an answer "
        "(0 % trained tokens). Either the answers are empty, or no message is the assistant's: check the columns "
        "(data.train.columns) and roles, or set data.train_on=all to train on every token"
    )


def _find_warnings(
    splits: Sequence[SplitStatistics], trained_percent: float | None, closed: bool, at_model_limit: bool
) -> list[str]:
    warnings = []
    remedy = "the model reads no more" if at_model_limit else "a larger data.max_length keeps it"
    if trained_percent is not None and trained_percent < MIN_TRAINED_PERCENT and not closed:
        warnings.append(
            f"only {trained_percent:.2g} % of the tokens are trained on: long contexts with short answers cost much "
            "and teach little; is the answer where it should be?"
        )
    if trained_percent is not None and trained_percent > MAX_TRAINED_PERCENT and not splits[0].label_counts:
        warnings.append(
            f"{trained_percent:.3g} % of the tokens are trained on: right for plain text; with questions and answers "
            "the questions would be trained on too (data.train_on, data.train.columns)"
        )
    for split in splits:
        has_gaps = split.num_without_targets and split.trained_percent is not None
        if has_gaps and not split.num_truncated_targets:
            warnings.append(
                f"{split.name}: {split.num_without_targets:,} of {split.num_examples:,} examples have no trained tokens"
            )
        if split.num_truncated_targets:
            warnings.append(
                f"{split.name}: truncation cuts the answer of {split.num_truncated_targets:,} of "
                f"{split.num_examples:,} examples: {remedy}"
            )
        elif split.num_truncated > split.num_examples / 10:
            warnings.append(
                f"{split.name}: truncation cuts the start of the context of {split.num_truncated:,} of "
                f"{split.num_examples:,} examples ({split.num_truncated_tokens:,} tokens): {remedy}"
            )
    return warnings + _find_class_warnings(splits[0])


def _warn_same_answer(items: Sequence[EncodedExample]) -> Iterator[str]:
    answers = {item.reference for item in items}
    if len(answers) == 1 < len(items) and (answer := answers.pop()):
        yield f"train: every answer is {answer[:60]!r}: a model that always gives it is right and learns nothing else"


def _find_class_warnings(train: SplitStatistics) -> list[str]:
    warnings = []
    missing = [name for name, count in train.label_counts.items() if not count]
    if missing:
        names = ", ".join(map(repr, missing[:8])) + (", ..." if len(missing) > 8 else "")
        warnings.append(f"train: no example of {names}: a class without examples is not learned")
    present = [name for name, count in train.label_counts.items() if count]
    if len(train.label_counts) > 1 and len(present) == 1:
        warnings.append(f"train: every example is {present[0]!r}: there is only one class")
    return warnings


def render_spans(example: EncodedExample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The example as the model takes it, special tokens too: (text, whether it is trained on), exact to the token.

    The texts joined are the decoded whole. A border inside a character gives the character to the token that completes
    it.
    """
    is_trained = [label != IGNORE_INDEX for label in example.labels] or [False] * len(example.input_ids)
    spans = _render_part(example.input_ids, is_trained, tokenizer)
    if example.target_ids:
        spans += _render_part(example.target_ids, [True] * len(example.target_ids), tokenizer)
    return spans


def _render_part(
    ids: Sequence[int], is_trained: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    text = _decode(ids, tokenizer)
    borders = [i for i in range(1, len(ids)) if is_trained[i] != is_trained[i - 1]]
    spans, span_start, first_token = [], 0, 0
    for border in [*borders, len(ids)]:
        span_end = len(text)
        if border < len(ids):
            span_end = max(span_start, common_prefix_length(_decode(ids[:border], tokenizer), text))
        if span_end > span_start:
            spans.append((text[span_start:span_end], is_trained[first_token]))
        span_start, first_token = span_end, border
    return spans


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
