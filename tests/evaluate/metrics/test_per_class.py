"""Scores class by class, for one class per example, several labels, entities and tags."""

from __future__ import annotations

import random

from kitout.evaluate.intervals.resampled import wilson_interval
from kitout.evaluate.metrics.per_class import ClassScore, class_scores

NAMES = ("a", "b", "c")


def expected(found: list[set[int]], actual: list[set[int]], label: int) -> ClassScore:
    """As the textbook has it, example by example."""
    hits = sum(label in a and label in b for a, b in zip(found, actual, strict=True))
    predicted, n = (sum(label in labels for labels in rows) for rows in (found, actual))
    return ClassScore(
        NAMES[label], n, predicted, hits / predicted, hits / n, *wilson_interval(hits, n), 2 * hits / (predicted + n)
    )  # fmt: skip


def test_classes_one_by_one() -> None:
    rng = random.Random(0)
    predictions, references = ([rng.randrange(3) for _ in range(50)] for _ in range(2))
    scores = class_scores("classification", predictions, references, NAMES)
    sets = [[{label} for label in labels] for labels in (predictions, references)]
    assert scores == [expected(*sets, label) for label in range(3)]
    words = [[NAMES[i] for i in labels] for labels in (predictions, references)]
    assert class_scores("classification", *words, NAMES) == scores


def test_several_labels_are_counted_each() -> None:
    rng = random.Random(1)
    predictions, references = ([[rng.randrange(2) for _ in NAMES] for _ in range(40)] for _ in range(2))
    sets = [[{i for i, value in enumerate(row) if value} for row in rows] for rows in (predictions, references)]
    assert class_scores("multilabel", predictions, references, NAMES) == [expected(*sets, i) for i in range(3)]


def test_entities_are_counted_whole_by_type() -> None:
    names = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    references = [[1, 2, 0, 3], [0, 1, 0, 0]]
    predictions = [[1, 2, 0, 0], [0, 1, 2, 0]]
    scores = {one.name: one for one in class_scores("tokens", predictions, references, names)}
    assert (scores["PER"].n, scores["PER"].predicted, scores["PER"].recall) == (2, 2, 0.5)
    assert (scores["LOC"].n, scores["LOC"].predicted, scores["LOC"].f1) == (1, 0, 0.0)
    (word,) = class_scores("tokens", [[1, 0]], [[1, 1]], ("O", "W"))
    assert (word.name, word.n, word.recall, word.precision) == ("W", 2, 0.5, 1.0)


def test_a_class_without_examples_is_left_out_unless_it_is_predicted() -> None:
    scores = class_scores("classification", [0, 2], [0, 0], NAMES)
    assert [(one.name, one.n, one.predicted) for one in scores] == [("a", 2, 1), ("c", 0, 1)]
    assert (scores[1].recall, scores[1].low, scores[1].high) == (0.0, 0.0, 1.0)


def test_recall_of_groups_has_the_interval_of_groups() -> None:
    groups = [i // 10 for i in range(100)]
    references = [0] * 90 + [1] * 10
    predictions = [0 if g % 2 else 2 for g in groups]  # whole groups are right or wrong
    plain = class_scores("classification", predictions, references, NAMES)
    found = class_scores("classification", predictions, references, NAMES, groups)
    assert [(a.name, a.n, a.recall) for a in found] == [(a.name, a.n, a.recall) for a in plain]
    assert found[0].high - found[0].low > 2 * (plain[0].high - plain[0].low)
    assert (found[1].low, found[1].high) == (0.0, 1.0), "all of one group"
    alone = class_scores("classification", predictions, references, NAMES, list(range(100)))
    assert abs(alone[0].low - plain[0].low) < 0.02
