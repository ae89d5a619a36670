"""Counts by true and predicted class are the same however the classes are given, and sum to the examples."""

from __future__ import annotations

from kitout.evaluate.metrics.confusion import Confusion, confusion_matrix

NAMES = ("no", "maybe", "yes", "never seen")
TRUE = [0, 0, 0, 1, 2, 2]
FOUND = [0, 2, 2, 0, 2, 2]


def test_counts_of_classes_by_index_and_by_name() -> None:
    matrix = confusion_matrix("classification", FOUND, TRUE, NAMES)
    assert matrix == Confusion(("no", "maybe", "yes"), ((1, 0, 2), (1, 0, 0), (0, 0, 2)))
    names = ([NAMES[i] for i in rows] for rows in (FOUND, TRUE))
    assert confusion_matrix("classification", *names, NAMES) == matrix
    assert (matrix.total, matrix.correct) == (6, 3)
    assert matrix.errors(5) == [("no", "yes", 2, 3), ("maybe", "no", 1, 1)]
    assert matrix.errors(1) == [("no", "yes", 2, 3)]


def test_an_answer_outside_the_set_has_its_own_column() -> None:
    matrix = confusion_matrix("classification", ["no", "what"], ["no", "yes"], NAMES)
    assert matrix == Confusion(("no", "yes", "what"), ((1, 0, 0), (0, 0, 1), (0, 0, 0)))


def test_words_by_the_type_of_their_tag() -> None:
    names = ("O", "B-per", "I-per", "B-loc")
    matrix = confusion_matrix("tokens", [[0, 1, 0], [3]], [[0, 1, 2], [1]], names)
    assert matrix == Confusion(("O", "per", "loc"), ((1, 0, 0), (1, 1, 1), (0, 0, 0)))


def test_several_labels_and_numbers_have_none() -> None:
    assert confusion_matrix("multilabel", [[1, 0]], [[1, 1]], NAMES) is None
    assert confusion_matrix("regression", [1.0], [2.0], ()) is None
    assert confusion_matrix("classification", [], [], NAMES) is None
