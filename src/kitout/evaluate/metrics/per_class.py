"""Scores class by class: how many examples a class has, and precision, recall and F1 of it.

One class per example, any number of labels, or entities in tagged words: each is counted as (true, predicted, both) of
a class, and the scores follow. Recall has Wilson's interval, because few examples of a class say little; of examples in
groups it has that of groups. It knows no text and no model.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kitout.evaluate.intervals.bounded import bounded_interval
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.intervals.resampled import wilson_interval
from kitout.evaluate.metrics.entities import entity_spans
from kitout.evaluate.metrics.measure import number_groups, safe_divide


@dataclass(frozen=True)
class ClassScore:
    """One class. (The names are keys of results.json.)"""

    name: str
    """Of the class."""
    n: int
    """Test examples (or entities) of it."""
    predicted: int
    """How often it was predicted."""
    precision: float
    """The fraction of its predictions that are right; 0 without any."""
    recall: float
    """The fraction of its examples that are found; 0 without any."""
    low: float
    """Lower end of the recall's 95 % interval."""
    high: float
    """Upper end of it."""
    f1: float
    """The harmonic mean of precision and recall."""


def class_scores(
    task: str, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str],
    groups: Sequence[Hashable] = (),
) -> list[ClassScore]:  # fmt: skip
    """Every class that is in the references or the predictions, in the order of the names.

    task: classification (indices into the names, or the names themselves), multilabel (0/1 vectors), or tokens
    (sequences of indices; classes are the types of entities, else the tags). groups: of each example; empty: each
    stands for itself.
    """
    if task == "multilabel":
        found = [({i for i, is_set in enumerate(row) if is_set}) for row in predictions]
        actual = [({i for i, is_set in enumerate(row) if is_set}) for row in references]
        return _scores(found, actual, dict(enumerate(names)), groups)
    if task == "tokens":
        return _tag_scores(predictions, references, names, groups)
    titles: dict[Hashable, str] = {**dict(enumerate(names)), **{name: name for name in names}}
    return _scores([{label} for label in predictions], [{label} for label in references], titles, groups)


def _tag_scores(
    predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]], names: Sequence[str],
    groups: Sequence[Hashable],
) -> list[ClassScore]:  # fmt: skip
    """Entities where tags are B- and I-, else tokens by their tag; "O" is no class."""
    tags = [[[names[tag] for tag in row] for row in rows] for rows in (predictions, references)]
    is_bio = any(tag.startswith(("B-", "I-")) for row in tags[1] for tag in row)
    spans = [
        [entity_spans(row) if is_bio else {(tag, i, i) for i, tag in enumerate(row) if tag != "O"} for row in rows]
        for rows in tags
    ]
    types = dict.fromkeys(name.partition("-")[2] if is_bio else name for name in names if name != "O")
    scores = []
    for one in types:
        found, actual = ([{span for span in row if span[0] == one} for row in rows] for rows in spans)
        both = sum(len(a & b) for a, b in zip(found, actual, strict=True))
        numbers = sum(map(len, actual)), sum(map(len, found)), both
        pairs = [(len(a & b), len(b)) for a, b in zip(found, actual, strict=True)]
        scores += [_score(one, *numbers, interval=_recall_interval(pairs, groups))] if any(numbers) else []
    return scores


def _scores(
    predictions: Sequence[set[Any]], references: Sequence[set[Any]], titles: dict[Any, str],
    groups: Sequence[Hashable],
) -> list[ClassScore]:  # fmt: skip
    counts = {label: [0, 0, 0] for label in titles}
    for found, actual in zip(predictions, references, strict=True):
        for position, labels in enumerate((actual, found, found & actual)):
            for label in labels:
                counts.setdefault(label, [0, 0, 0])[position] += 1
    intervals = {
        label: _recall_interval(
            [(int(label in a and label in b), int(label in b)) for a, b in zip(predictions, references, strict=True)],
            groups,
        )
        for label in (counts if groups else ())
    }
    return [
        _score(titles.get(label, str(label)), *numbers, interval=intervals.get(label))
        for label, numbers in counts.items()
        if any(numbers)
    ]


def _recall_interval(pairs: Sequence[tuple[int, int]], groups: Sequence[Hashable]) -> tuple[float, float] | None:
    """By whole groups. pairs: of each example, how many of the class are found and how many there are."""
    own = [i for i, (_, n) in enumerate(pairs) if n]
    if not groups or not own:
        return None
    names = [groups[i] for i in own]
    if len(set(names)) < 2:
        return 0.0, 1.0
    found, there = np.array([pairs[i] for i in own], dtype=np.float64).T
    return bounded_interval(Ratio(found, there), number_groups(names, len(own)))


def _score(name: str, n: int, predicted: int, both: int, *, interval: tuple[float, float] | None) -> ClassScore:
    low, high = interval or (wilson_interval(both, n) if n else (0.0, 1.0))
    precision, recall = safe_divide(both, predicted), safe_divide(both, n)
    return ClassScore(name, n, predicted, precision, recall, low, high, safe_divide(2 * both, n + predicted))
