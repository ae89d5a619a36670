"""What is true of the examples before anything is learnt: lengths, labels, and how much of them the loss is taken over.

Counted over all examples, never over a sample. What cannot be learnt from is an error that says why, what looks wrong
is a warning. It knows no file format and no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.read.tables import DataError
from kitout.errors import Errors
from kitout.format import common_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
MAX_BINS = 12
MAX_SINGLETON_LABELS = 10  # labels that may be seen once
MIN_TRAINED_PERCENT, MAX_TRAINED_PERCENT = 5.0, 95.0  # percent of the tokens that are learnt


@dataclass(frozen=True)
class SplitStatistics:
    """One part of the data. learned: tokens the loss is taken over (0 where a whole example has one value).

    percent: learned of tokens; None where examples have values. quantiles: of the lengths, by QUANTILES. bins: (from,
    to, examples), both ends within. cut: examples that truncation shortened; lost: those whose answer lost tokens.
    empty: examples nothing of which is learnt. labels: examples (or tokens) of each class; values: least, mean and
    greatest of numbers.
    """

    name: str
    num_examples: int
    num_tokens: int
    num_targets: int
    trained_percent: float | None
    quantiles: tuple[int, ...]
    histogram: tuple[tuple[int, int, int], ...]
    max_length: int
    longest_location: str
    num_truncated: int
    num_truncated_tokens: int
    num_truncated_targets: int
    num_without_targets: int
    label_counts: Mapping[str, int]
    value_range: tuple[float, float, float] | None


@dataclass(frozen=True)
class DataStatistics:
    """Of every part, train first. percent: learned of all tokens."""

    splits: tuple[SplitStatistics, ...]
    trained_percent: float | None
    warnings: tuple[str, ...]

    def __getitem__(self, name: str) -> SplitStatistics:
        return next(part for part in self.splits if part.name == name)

    @property
    def train(self) -> SplitStatistics:
        return self.splits[0]


def compute_statistics(
    splits: Mapping[str, Sequence[EncodedExample]], label_names: Sequence[str] = (), closed: bool = False
) -> DataStatistics:
    """Of {"train": items, "validation": items, ...}; empty parts are left out, but train must not be empty.

    names: of the classes, in order. closed: the answers are labels, and short by nature.
    DataError where there is nothing to learn from.
    """
    if not splits.get("train"):
        raise DataError("the training part holds no examples")
    found = tuple(_compute_split(name, items, label_names) for name, items in splits.items() if len(items))
    faults = Errors(DataError, "nothing can be learnt from this data")
    for part in found:
        if part.num_without_targets == part.num_examples:
            faults.add(_no_targets_message(part))
    faults.raise_if_any()
    tokens = sum(part.num_tokens for part in found if part.trained_percent is not None)
    learned = sum(part.num_targets for part in found)
    percent = 100 * learned / tokens if tokens else None
    return DataStatistics(
        found, percent, (*_find_warnings(found, percent, closed), *_warn_same_answer(splits["train"]))
    )


def _compute_split(name: str, items: Sequence[EncodedExample], label_names: Sequence[str]) -> SplitStatistics:
    lengths = sorted(item.length for item in items)
    longest = max(items, key=lambda item: item.length)
    valued = items[0].label is not None
    tokens, learned = sum(lengths), 0 if valued else sum(item.num_targets for item in items)
    counted = _count_labels(items, label_names)
    numbers = [float(item.label) for item in items if isinstance(item.label, float)] if not label_names else []
    return SplitStatistics(
        name=name,
        num_examples=len(items),
        num_tokens=tokens,
        num_targets=learned,
        trained_percent=None if valued or not tokens else 100 * learned / tokens,
        quantiles=tuple(lengths[round(q * (len(lengths) - 1))] for q in QUANTILES),
        histogram=_compute_histogram(lengths),
        max_length=longest.length,
        longest_location=longest.location,
        num_truncated=sum(item.num_truncated > 0 for item in items),
        num_truncated_tokens=sum(item.num_truncated for item in items),
        num_truncated_targets=sum(item.num_truncated_targets > 0 for item in items),
        num_without_targets=sum(item.num_targets == 0 for item in items),
        label_counts=counted,
        value_range=(min(numbers), sum(numbers) / len(numbers), max(numbers)) if numbers else None,
    )


def _compute_histogram(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Of equal, round width over the lengths there are (sorted): at most BINS."""
    least, most = lengths[0], lengths[-1]
    if most == 0:
        return ()
    width = next(w for power in range(9) for w in (10**power, 2 * 10**power, 5 * 10**power)
                 if most // w - least // w < MAX_BINS)  # fmt: skip
    counts = Counter(length // width for length in lengths)
    return tuple((i * width, (i + 1) * width - 1, counts[i]) for i in range(least // width, most // width + 1))


def _count_labels(items: Sequence[EncodedExample], label_names: Sequence[str]) -> dict[str, int]:
    """By class, every class of the names: of sequences, of several at once, or of tokens."""
    if not label_names:
        return {}
    counts: Counter[int] = Counter()
    for item in items:
        if isinstance(item.label, tuple):
            counts.update(i for i, held in enumerate(item.label) if held)
        elif item.label is not None:
            counts[int(item.label)] += 1
        else:
            counts.update(label for label in item.labels if label != IGNORE_INDEX)
    return {name: counts[i] for i, name in enumerate(label_names)}


def _no_targets_message(split: SplitStatistics) -> str:
    """Why nothing is learnt, and what to do."""
    if split.num_truncated_targets:
        return (
            f"{split.name}: truncation took the answer of {split.num_truncated_targets:,} of "
            f"{split.num_examples:,} examples (the longest have "
            f"{split.max_length:,} tokens left and lost {split.num_truncated_tokens:,} in all): say a larger "
            "data.max_length"
        )
    return (
        f"{split.name}: of {split.num_tokens:,} tokens in {split.num_examples:,} examples none is an answer (0 "
        "% learnt). Either "
        "the answers are empty, or no message is the assistant's: look at the columns (data.train.columns) and roles, "
        "or say data.train_on=all to learn every token"
    )


def _find_warnings(splits: Sequence[SplitStatistics], trained_percent: float | None, closed: bool) -> list[str]:
    told = []
    if trained_percent is not None and trained_percent < MIN_TRAINED_PERCENT and not closed:
        told.append(
            f"only {trained_percent:.2g} % of the tokens are learnt: long contexts and short answers cost much "
            "and teach "
            "little; is the answer where it should be?"
        )
    if trained_percent is not None and trained_percent > MAX_TRAINED_PERCENT and not splits[0].label_counts:
        told.append(
            f"{trained_percent:.3g} % of the tokens are learnt: that is right for plain text; with questions "
            "and answers the "
            "questions would be learnt too (data.train_on, data.train.columns)"
        )
    for part in splits:
        few = part.num_without_targets and part.trained_percent is not None
        if few and not part.num_truncated_targets:
            told.append(
                f"{part.name}: {part.num_without_targets:,} of {part.num_examples:,} examples hold nothing to learn"
            )
        if part.num_truncated_targets:
            told.append(
                f"{part.name}: truncation cuts the answer of {part.num_truncated_targets:,} of "
                f"{part.num_examples:,} examples: "
                "a larger data.max_length keeps it"
            )
        elif part.num_truncated > part.num_examples / 10:
            told.append(
                f"{part.name}: {part.num_truncated:,} of {part.num_examples:,} examples lose the front of their "
                "context "
                f"({part.num_truncated_tokens:,} tokens): a larger data.max_length keeps it"
            )
    told += _find_class_warnings(splits)
    return told


def _warn_same_answer(items: Sequence[EncodedExample]) -> Iterator[str]:
    said = {item.reference for item in items}
    if len(said) == 1 < len(items) and (only := said.pop()):
        yield f"train: every answer is {only[:60]!r}: whoever always says so is right, and nothing else is learnt"


def _find_class_warnings(splits: Sequence[SplitStatistics]) -> list[str]:
    train = splits[0]
    told = []
    missing = [name for name, count in train.label_counts.items() if not count]
    if missing:
        shown = ", ".join(map(repr, missing[:8])) + (", ..." if len(missing) > 8 else "")
        told.append(f"train: no example of {shown}: what is not shown is not learnt")
    held = [name for name, count in train.label_counts.items() if count]
    if len(train.label_counts) > 1 and len(held) == 1:
        told.append(f"train: every example is {held[0]!r}: there is nothing to tell apart")
    alone = sum(train.label_counts[name] == 1 for name in held)
    if alone > max(MAX_SINGLETON_LABELS, len(held) / 2):
        told.append(f"train: {alone:,} of {len(held):,} labels have one example each: is the label in another column?")
    return told


def render_spans(example: EncodedExample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The example as the model takes it, special tokens too: (text, whether it is learnt), exact to the token.

    The texts joined are the decoded whole. Where a border lies inside a character, the character goes to the token
    that completes it.
    """
    learnt = [label != IGNORE_INDEX for label in example.labels] or [False] * len(example.input_ids)
    spans = _render_part(example.input_ids, learnt, tokenizer)
    return spans + (
        _render_part(example.target_ids, [True] * len(example.target_ids), tokenizer) if example.target_ids else []
    )


def _render_part(
    ids: Sequence[int], is_trained: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    whole = _decode(ids, tokenizer)
    borders = [i for i in range(1, len(ids)) if is_trained[i] != is_trained[i - 1]]
    spans, done, start = [], 0, 0
    for border in [*borders, len(ids)]:
        end = len(whole)
        if border < len(ids):
            end = max(done, common_prefix_length(_decode(ids[:border], tokenizer), whole))
        if end > done:
            spans.append((whole[done:end], is_trained[start]))
        done, start = end, border
    return spans


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
