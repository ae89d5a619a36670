"""What is true of the examples before anything is learnt: lengths, labels, and how much of them the loss is taken over.

Counted over all examples, never over a sample. What cannot be learnt from is an error that says why, what looks wrong
is a warning. It knows no file format and no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kitout.data.encode.item import IGNORED, Item
from kitout.data.read.tables import DataError
from kitout.errors import Faults
from kitout.format import common_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
BINS = 12
ALONE = 10  # labels that may be seen once
LITTLE, MUCH = 5.0, 95.0  # percent of the tokens that are learnt


@dataclass(frozen=True)
class Part:
    """One part of the data. learned: tokens the loss is taken over (0 where a whole example has one value).

    percent: learned of tokens; None where examples have values. quantiles: of the lengths, by QUANTILES. bins: (from,
    to, examples), both ends within. cut: examples that truncation shortened; lost: those whose answer lost tokens.
    empty: examples nothing of which is learnt. labels: examples (or tokens) of each class; values: least, mean and
    greatest of numbers.
    """

    name: str
    examples: int
    tokens: int
    learned: int
    percent: float | None
    quantiles: tuple[int, ...]
    bins: tuple[tuple[int, int, int], ...]
    longest: int
    longest_place: str
    cut: int
    cut_tokens: int
    lost: int
    empty: int
    labels: Mapping[str, int]
    values: tuple[float, float, float] | None


@dataclass(frozen=True)
class Facts:
    """Of every part, train first. percent: learned of all tokens."""

    parts: tuple[Part, ...]
    percent: float | None
    warnings: tuple[str, ...]

    def __getitem__(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    @property
    def train(self) -> Part:
        return self.parts[0]


def facts(parts: Mapping[str, Sequence[Item]], names: Sequence[str] = (), closed: bool = False) -> Facts:
    """Of {"train": items, "validation": items, ...}; empty parts are left out, but train must not be empty.

    names: of the classes, in order. closed: the answers are labels, and short by nature.
    DataError where there is nothing to learn from.
    """
    if not parts.get("train"):
        raise DataError("the training part holds no examples")
    found = tuple(_part(name, items, names) for name, items in parts.items() if len(items))
    faults = Faults(DataError, "nothing can be learnt from this data")
    for part in found:
        if part.empty == part.examples:
            faults.add(_nothing(part))
    faults.raise_if_any()
    tokens = sum(part.tokens for part in found if part.percent is not None)
    learned = sum(part.learned for part in found)
    percent = 100 * learned / tokens if tokens else None
    return Facts(found, percent, (*_warnings(found, percent, closed), *_same_answer(parts["train"])))


def _part(name: str, items: Sequence[Item], names: Sequence[str]) -> Part:
    lengths = sorted(item.length for item in items)
    longest = max(items, key=lambda item: item.length)
    valued = items[0].value is not None
    tokens, learned = sum(lengths), 0 if valued else sum(item.learned for item in items)
    counted = _labels(items, names)
    numbers = [float(item.value) for item in items if isinstance(item.value, float)] if not names else []
    return Part(
        name=name,
        examples=len(items),
        tokens=tokens,
        learned=learned,
        percent=None if valued or not tokens else 100 * learned / tokens,
        quantiles=tuple(lengths[round(q * (len(lengths) - 1))] for q in QUANTILES),
        bins=_bins(lengths),
        longest=longest.length,
        longest_place=longest.place,
        cut=sum(item.cut > 0 for item in items),
        cut_tokens=sum(item.cut for item in items),
        lost=sum(item.lost > 0 for item in items),
        empty=sum(item.learned == 0 for item in items),
        labels=counted,
        values=(min(numbers), sum(numbers) / len(numbers), max(numbers)) if numbers else None,
    )


def _bins(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Of equal, round width over the lengths there are (sorted): at most BINS."""
    least, most = lengths[0], lengths[-1]
    if most == 0:
        return ()
    width = next(w for power in range(9) for w in (10**power, 2 * 10**power, 5 * 10**power)
                 if most // w - least // w < BINS)  # fmt: skip
    counts = Counter(length // width for length in lengths)
    return tuple((i * width, (i + 1) * width - 1, counts[i]) for i in range(least // width, most // width + 1))


def _labels(items: Sequence[Item], names: Sequence[str]) -> dict[str, int]:
    """By class, every class of the names: of sequences, of several at once, or of tokens."""
    if not names:
        return {}
    counts: Counter[int] = Counter()
    for item in items:
        if isinstance(item.value, tuple):
            counts.update(i for i, held in enumerate(item.value) if held)
        elif item.value is not None:
            counts[int(item.value)] += 1
        else:
            counts.update(label for label in item.labels if label != IGNORED)
    return {name: counts[i] for i, name in enumerate(names)}


def _nothing(part: Part) -> str:
    """Why nothing is learnt, and what to do."""
    if part.lost:
        return (
            f"{part.name}: truncation took the answer of {part.lost:,} of {part.examples:,} examples (the longest have "
            f"{part.longest:,} tokens left and lost {part.cut_tokens:,} in all): say a larger data.max_length"
        )
    return (
        f"{part.name}: of {part.tokens:,} tokens in {part.examples:,} examples none is an answer (0 % learnt). Either "
        "the answers are empty, or no message is the assistant's: look at the columns (data.train.columns) and roles, "
        "or say data.learn=all to learn every token"
    )


def _warnings(parts: Sequence[Part], percent: float | None, closed: bool) -> list[str]:
    told = []
    if percent is not None and percent < LITTLE and not closed:
        told.append(
            f"only {percent:.2g} % of the tokens are learnt: long contexts and short answers cost much and teach "
            "little; is the answer where it should be?"
        )
    if percent is not None and percent > MUCH and not parts[0].labels:
        told.append(
            f"{percent:.3g} % of the tokens are learnt: that is right for plain text; with questions and answers the "
            "questions would be learnt too (data.learn, data.train.columns)"
        )
    for part in parts:
        few = part.empty and part.percent is not None
        if few and not part.lost:
            told.append(f"{part.name}: {part.empty:,} of {part.examples:,} examples hold nothing to learn")
        if part.lost:
            told.append(
                f"{part.name}: truncation cuts the answer of {part.lost:,} of {part.examples:,} examples: "
                "a larger data.max_length keeps it"
            )
        elif part.cut > part.examples / 10:
            told.append(
                f"{part.name}: {part.cut:,} of {part.examples:,} examples lose the front of their context "
                f"({part.cut_tokens:,} tokens): a larger data.max_length keeps it"
            )
    told += _class_warnings(parts)
    return told


def _same_answer(items: Sequence[Item]) -> Iterator[str]:
    said = {item.reference for item in items}
    if len(said) == 1 < len(items) and (only := said.pop()):
        yield f"train: every answer is {only[:60]!r}: whoever always says so is right, and nothing else is learnt"


def _class_warnings(parts: Sequence[Part]) -> list[str]:
    train = parts[0]
    told = []
    missing = [name for name, count in train.labels.items() if not count]
    if missing:
        shown = ", ".join(map(repr, missing[:8])) + (", ..." if len(missing) > 8 else "")
        told.append(f"train: no example of {shown}: what is not shown is not learnt")
    held = [name for name, count in train.labels.items() if count]
    if len(train.labels) > 1 and len(held) == 1:
        told.append(f"train: every example is {held[0]!r}: there is nothing to tell apart")
    alone = sum(train.labels[name] == 1 for name in held)
    if alone > max(ALONE, len(held) / 2):
        told.append(f"train: {alone:,} of {len(held):,} labels have one example each: is the label in another column?")
    return told


def rendered(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The example as the model takes it, special tokens too: (text, whether it is learnt), exact to the token.

    The texts joined are the decoded whole. Where a border lies inside a character, the character goes to the token
    that completes it.
    """
    learnt = [label != IGNORED for label in item.labels] or [False] * len(item.ids)
    spans = _spans(item.ids, learnt, tokenizer)
    return spans + (_spans(item.target, [True] * len(item.target), tokenizer) if item.target else [])


def _spans(ids: Sequence[int], learnt: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    whole = _decoded(ids, tokenizer)
    borders = [i for i in range(1, len(ids)) if learnt[i] != learnt[i - 1]]
    spans, done, start = [], 0, 0
    for border in [*borders, len(ids)]:
        end = len(whole)
        if border < len(ids):
            end = max(done, common_prefix_length(_decoded(ids[:border], tokenizer), whole))
        if end > done:
            spans.append((whole[done:end], learnt[start]))
        done, start = end, border
    return spans


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
