"""Nothing that is measured on is learnt from, shares are kept, and the same seed parts the same."""

from __future__ import annotations

from collections import Counter

import pytest

from kitout.data.examples.convert import single
from kitout.data.examples.examples import Example, Labelled, Text
from kitout.data.parts import Parts, part
from kitout.data.read.tables import DataError


def labelled(count: int, classes: str = "aab") -> list[Example]:
    return [Labelled(f"text {i}", classes[i % len(classes)]) for i in range(count)]


def input_keys(examples: tuple[Example, ...]) -> set[str]:
    return {e.input_key for e in examples}


def apart(parts: Parts) -> bool:
    train, validation, test = input_keys(parts.train), input_keys(parts.validation), input_keys(parts.test)
    return not (train & validation or train & test or validation & test)


def test_shares_and_numbers() -> None:
    for asked, sizes in (((0.05, 0.1), (255, 15, 30)), ((7, 20), (273, 7, 20)), ((0, 0), (300, 0, 0))):
        parts = part({"": labelled(300)}, *asked)
        assert (len(parts.train), len(parts.validation), len(parts.test)) == sizes
        assert apart(parts)
        assert parts.copies == parts.leaked == 0


def test_the_seed_decides_and_test_does_not_depend_on_validation() -> None:
    given = {"": labelled(300)}
    assert part(given, seed=1) == part(given, seed=1) != part(given, seed=2)
    assert part(given, validation=0.2).test == part(given, validation=0).test


def test_classes_keep_their_shares() -> None:
    parts = part({"": labelled(300, "aaaaaaaabc")}, validation=30, test=60)
    assert Counter(e.answer_text() for e in parts.test) == {"a": 48, "b": 6, "c": 6}
    assert Counter(e.answer_text() for e in parts.validation) == {"a": 24, "b": 3, "c": 3}
    assert parts.majority == 0.8


def test_a_class_of_one_is_learnt() -> None:
    parts = part({"": [*labelled(50), Labelled("odd", "only")]}, validation=5, test=20)
    assert "only" in {e.answer_text() for e in parts.train}


def test_near_copies_stay_together_and_copies_count_once() -> None:
    said = [Labelled(words, label) for i in range(100) for words, label in ((f"Text {i}", "a"), (f"text  {i} ", "b"))]
    parts = part({"": [*said, *said[:10]]}, validation=0.1, test=0.2)
    assert apart(parts)
    assert parts.copies == 10
    assert parts.open == len(parts.train) // 2 == len(input_keys(parts.train))
    assert len(parts.train) + len(parts.validation) + len(parts.test) == 200


def test_given_parts_stay_and_train_gives_way() -> None:
    given = {
        "train": [Text("a"), Text("B "), Text("c"), Text("d")],
        "validation": [Text("d"), Text("x"), Text("Y")],
        "test": [Text("b"), Text("y"), Text("y")],
    }
    parts = part(given)
    assert [[e.source_text() for e in p] for p in (parts.train, parts.validation, parts.test)] == [
        ["a", "c"], ["d", "x"], ["b", "y"],
    ]  # fmt: skip
    assert (parts.copies, parts.leaked) == (1, 3)
    assert str(parts) == "train 2, validation 2, test 2, copies left out: 1, left out because they are measured on: 3"


def test_a_missing_part_is_taken_from_what_may_be_learnt() -> None:
    parts = part({"train": labelled(90), "": labelled(100), "test": [Labelled("other", "a")]}, validation=0.1)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (90, 10, 1)
    assert parts.copies == 90


def test_the_majority_needs_a_small_closed_set() -> None:
    chats = [single(f"q {i}", "yes" if i % 4 else "no") for i in range(100)]
    assert part({"": chats}, validation=0, test=20).majority == pytest.approx(0.75, abs=0.2)
    assert part({"": [single(f"q {i}", f"a {i}") for i in range(200)]}).majority is None
    assert part({"": [Text(f"t {i}") for i in range(200)]}).majority is None
    assert part({"": chats}, test=0).majority is None


@pytest.mark.parametrize(
    ("given", "asked", "words"),
    [
        ({"test": labelled(3)}, {}, "the training part is empty"),
        ({"train": labelled(3), "test": labelled(3)}, {}, "all 3 training examples are also in the"),
        ({"": labelled(10)}, {"test": 8}, "8 examples for test are more than half of the 10"),
        ({"": labelled(10)}, {"test": -1}, "test is -1; expected a share"),
        ({"": [Labelled("a", "x")]}, {"validation": 1, "test": 0}, "give a validation file"),
    ],
)
def test_what_cannot_be_parted(given: dict[str, list[Example]], asked: dict[str, float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        part(given, **asked)
