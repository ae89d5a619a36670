"""The closed set of answers of a language-model run: which answers there are, and their tokens.

Where a run's answers are a few short ones that return (labels), a model is measured by the likeliest of them, not by
what it happens to write. The tokens of an answer are those that training examples have behind their prompt, so they
are what is trained on. It knows items, no model and no metric.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kitout.data.encode.item import Item
from kitout.data.read.tables import DataError
from kitout.errors import Faults, suggest
from kitout.evaluate.metrics.generation import MOST_LABELS, RETURNS

LONGEST = 16  # tokens of an answer that is a label and no sentence


@dataclass(frozen=True)
class ClosedAnswers:
    """Every answer that there is, in the order of `data.labels` or by how often it is trained on."""

    names: tuple[str, ...]
    """The answers as the data has them."""
    ids: tuple[tuple[int, ...], ...]
    """Of each answer: its tokens behind a prompt, without the one that ends it."""
    end: int
    """The token that ends an answer."""


def closed_answers(
    train: Sequence[Item], evaluated: Iterable[Item], asked: Sequence[str] | None = None
) -> ClosedAnswers | None:
    """The closed set of these items' answers, or None where they are no such set.

    They are one if the training split has 2 to MOST_LABELS different answers, each RETURNS times on average and of at
    most LONGEST tokens, and if the other splits have no further one. asked: the set itself (`data.labels`): DataError
    where the answers are not of it.
    """
    counts = Counter(item.reference for item in train)
    names = tuple(asked) if asked is not None else tuple(name for name, _ in counts.most_common())
    if asked is None and not (2 <= len(names) <= MOST_LABELS and RETURNS * len(names) <= len(train)):
        return None
    strange = [item for item in (*train, *evaluated) if item.reference not in names]
    tokens = _tokens(train, names)
    missing = [name for name in names if name not in tokens]
    ends = {ids[-1] for ids in tokens.values()}
    cut = {name: ids[:-1] for name, ids in tokens.items()}
    alike = len(set(cut.values())) < len(cut) or not all(cut.values())
    long = [name for name, ids in cut.items() if len(ids) > LONGEST]
    if asked is not None:
        faults = Faults(DataError, f"data.labels={list(asked)}")
        for item in strange[:3]:
            faults.add(
                f"{item.place}: the answer {item.reference!r} is not one of them; {suggest(item.reference, names)}"
            )
        if missing:
            faults.add(f"no training example answers {', '.join(map(repr, missing))}: leave it out, or add examples")
        faults.raise_if_any()
    if "" in names or strange or missing or len(ends) != 1 or alike or (long and asked is None):
        return None
    return ClosedAnswers(names, tuple(cut[name] for name in names), ends.pop())


def prompt_of(item: Item) -> tuple[int, ...]:
    """What an answer is generated from: the text before it, or the source of an encoder-decoder."""
    return item.ids[: item.prompt] if item.labels else item.ids


def _tokens(train: Sequence[Item], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Of each answer the tokens that most examples have for it; those that truncation has cut do not count."""
    found: dict[str, Counter[tuple[int, ...]]] = {name: Counter() for name in names}
    for item in train:
        if item.reference in found and not item.lost:
            found[item.reference][item.ids[item.prompt :] if item.labels else item.target] += 1
    return {name: counts.most_common(1)[0][0] for name, counts in found.items() if counts}
