"""What is counted of preference data before training, and what looks wrong about them.

Lengths of the answers by what they are (chosen, rejected, desirable, undesirable); labels that are all alike are an
error; answers whose length gives away which is better, pairs that come twice or both ways round and prompts that two
splits share are warnings. It knows items, no tokenizer and no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kitout.data.encode.item import AnyItem, EncodedExample, EncodedPair, EncodedPrompt, EncodedUnpaired

MAX_LONGER = 0.9  # of the pairs; more are a sign that length gives the better answer away
DESIRABLE, UNDESIRABLE = "desirable", "undesirable"

Histogram = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class AnswerLengths:
    """Tokens of the answers of one name in the train split, their end tokens included. The fields are keys of
    preflight.json.
    """

    name: str
    """chosen, rejected, desirable or undesirable."""
    num_answers: int
    """How many there are."""
    median: int
    """Of their lengths."""
    max_length: int
    """Of the longest."""
    histogram: Histogram
    """Of their lengths: (first, last, answers) of each bin, both ends included; the bins of all names are the same."""


def rows_of(item: AnyItem) -> tuple[EncodedExample, ...]:
    """What a model reads of an item; a prompt without its answer."""
    if isinstance(item, EncodedPair | EncodedUnpaired):
        return item.rows
    if isinstance(item, EncodedPrompt):
        return (EncodedExample(item.input_ids, num_truncated=item.num_truncated, location=item.location),)
    return (item,)


def answer_lengths(
    items: Sequence[AnyItem], histogram: Callable[[Sequence[int], int, int], Histogram]
) -> tuple[AnswerLengths, ...]:
    """By name, in order; empty for items without such names. histogram: (sorted lengths, shortest, longest) -> bins."""
    lengths: dict[str, list[int]] = {}
    for item in items:
        if isinstance(item, EncodedPair):
            lengths.setdefault("chosen", []).append(item.chosen.num_targets)
            lengths.setdefault("rejected", []).append(item.rejected.num_targets)
        elif isinstance(item, EncodedUnpaired):
            lengths.setdefault(label_name(item), []).append(item.num_targets)
    if not lengths:
        return ()
    shortest, longest = min(map(min, lengths.values())), max(map(max, lengths.values()))
    return tuple(
        AnswerLengths(
            name, len(of_name), of_name[(len(of_name) - 1) // 2], of_name[-1], histogram(of_name, shortest, longest)
        )
        for name, of_name in ((name, sorted(lengths[name])) for name in sorted(lengths))
    )


def label_name(item: EncodedUnpaired) -> str:
    """desirable or undesirable."""
    return DESIRABLE if item.is_desirable else UNDESIRABLE


def label_counts(items: Iterable[AnyItem]) -> dict[str, int]:
    """Judged answers by label, both labels; empty for others."""
    counts = Counter(label_name(item) for item in items if isinstance(item, EncodedUnpaired))
    return {name: counts[name] for name in (DESIRABLE, UNDESIRABLE)} if counts else {}


def find_answer_errors(train: Sequence[AnyItem]) -> Iterator[str]:
    """Why nothing can be learned from these items."""
    counts = label_counts(train)
    present = [name for name, count in counts.items() if count]
    if len(present) == 1:
        yield (
            f"train: all {counts[present[0]]:,} answers are {present[0]}: what is wanted is learned from both kinds; "
            "is the label in another column (columns.label)?"
        )


def find_answer_warnings(splits: Mapping[str, Sequence[AnyItem]]) -> Iterator[str]:
    """What looks wrong about the answers of the train split, and prompts that another split has too."""
    train = splits["train"]
    yield from _warn_of_pairs([item for item in train if isinstance(item, EncodedPair)])
    yield from _warn_of_labels([item for item in train if isinstance(item, EncodedUnpaired)])
    prompts = {_prompt_ids(item) for item in train if not isinstance(item, EncodedExample)}
    for name, items in splits.items() if prompts else ():
        if name != "train" and (shared := sum(_prompt_ids(item) in prompts for item in items)):
            yield (
                f"{name}: {shared:,} of {len(items):,} examples have a prompt whose tokens are in train too, "
                "perhaps by truncation: what is measured on them is not new to the model"
            )


def _warn_of_pairs(pairs: Sequence[EncodedPair]) -> Iterator[str]:
    differences = [pair.chosen.num_targets - pair.rejected.num_targets for pair in pairs]
    for verb, count in (("longer", sum(d > 0 for d in differences)), ("shorter", sum(d < 0 for d in differences))):
        if count > MAX_LONGER * len(pairs):
            yield (
                f"train: the chosen answer is {verb} than the rejected one in {100 * count / len(pairs):.3g} % of the "
                "pairs: a reward model can learn length in place of quality"
            )
    keys = [(_prompt_ids(pair), _answer_ids(pair.chosen), _answer_ids(pair.rejected)) for pair in pairs]
    first: dict[object, EncodedPair] = {}
    repeated, turned = [], []
    for key, pair in zip(keys, pairs, strict=True):
        prompt, chosen, rejected = key
        if key in first:
            repeated.append((first[key], pair))
        elif (other := first.get((prompt, rejected, chosen))) is not None:
            turned.append((other, pair))
        first.setdefault(key, pair)
    for found, what in (
        (repeated, "come more than once (with other margins, or as text that differs by less than a token)"),
        (turned, "come both ways round: what one prefers the other rejects"),
    ):
        if found:
            yield f"train: {len(found):,} of {len(pairs):,} pairs {what}{_places(*found[0])}"


def _warn_of_labels(answers: Sequence[EncodedUnpaired]) -> Iterator[str]:
    first: dict[object, EncodedUnpaired] = {}
    found = []
    for item in answers:
        other = first.setdefault(item.answer.input_ids, item)
        if other.is_desirable != item.is_desirable:
            found.append((other, item))
    if found:
        yield f"train: {len(found):,} of {len(answers):,} answers have both labels{_places(*found[0])}"


def _places(first: AnyItem, second: AnyItem) -> str:
    return f" (the first: {first.location} and {second.location})" if first.location and second.location else ""


def _prompt_ids(item: AnyItem) -> tuple[int, ...]:
    (row, *_) = rows_of(item)
    return row.input_ids if isinstance(item, EncodedPrompt) else row.input_ids[: row.prompt_length]


def _answer_ids(row: EncodedExample) -> tuple[int, ...]:
    return row.input_ids[row.prompt_length :]
