"""No input is in two splits, by text or by pixel; proportions are kept; the same seed gives the same splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kitout.data.examples.convert import one_turn_chat
from kitout.data.examples.examples import Example, LabeledText, Text
from kitout.data.images.image_set import ImageSet
from kitout.data.read.image_folders import from_arrays, load_images
from kitout.data.read.tables import DataError
from kitout.data.split import Splits, split_examples, split_images
from tiny_images import folder


def labeled(count: int, classes: str = "aab") -> list[Example]:
    return [LabeledText(f"text {i}", classes[i % len(classes)]) for i in range(count)]


def input_keys(examples: tuple[Example, ...]) -> set[str]:
    return {e.input_key for e in examples}


def are_disjoint(splits: Splits[Example]) -> bool:
    train, validation, test = input_keys(splits.train), input_keys(splits.validation), input_keys(splits.test)
    return not (train & validation or train & test or validation & test)


def test_fractions_and_numbers() -> None:
    for options, sizes in (((0.05, 0.1), (255, 15, 30)), ((7, 20), (273, 7, 20)), ((0, 0), (300, 0, 0))):
        splits = split_examples({"": labeled(300)}, *options)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
        assert are_disjoint(splits)
        assert splits.num_duplicates == splits.num_leaks == 0


def test_the_seed_decides_and_test_does_not_depend_on_validation() -> None:
    examples_by_split = {"": labeled(300)}
    assert (
        split_examples(examples_by_split, seed=1)
        == split_examples(examples_by_split, seed=1)
        != split_examples(examples_by_split, seed=2)
    )
    assert (
        split_examples(examples_by_split, validation=0.2).test == split_examples(examples_by_split, validation=0).test
    )


def test_labels_keep_their_proportions() -> None:
    splits = split_examples({"": labeled(300, "aaaaaaaabc")}, validation=30, test=60)
    assert Counter(e.answer_text() for e in splits.test) == {"a": 48, "b": 6, "c": 6}
    assert Counter(e.answer_text() for e in splits.validation) == {"a": 24, "b": 3, "c": 3}
    assert splits.majority_accuracy == 0.8


def test_a_class_of_one_is_trained_on() -> None:
    splits = split_examples({"": [*labeled(50), LabeledText("odd", "only")]}, validation=5, test=20)
    assert "only" in {e.answer_text() for e in splits.train}


def test_near_duplicates_stay_together_and_duplicates_count_once() -> None:
    examples = [
        LabeledText(text, label) for i in range(100) for text, label in ((f"Text {i}", "a"), (f"text  {i} ", "b"))
    ]
    splits = split_examples({"": [*examples, *examples[:10]]}, validation=0.1, test=0.2)
    assert are_disjoint(splits)
    assert splits.num_duplicates == 10
    assert splits.num_ambiguous == len(splits.train) // 2 == len(input_keys(splits.train))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 200


ANSWERS = {
    "case": ("paris is big", "Paris is big"),
    "indentation": ("if x:\n    y = 1", "if x:\n  y = 1"),
    "width": ("x²", "x2"),
    "white space": (" a", "a"),
}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_only_exact_copies_are_removed(answers: tuple[str, str]) -> None:
    """Half of a set that teaches case, indentation or signs would be taken for copies of the other half."""
    chats = [one_turn_chat(f"write {i}", answer) for i in range(40) for answer in answers]
    splits = split_examples({"": [*chats, *chats[:7]]}, validation=0.1, test=0.2)
    assert splits.num_duplicates == 7
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 80
    assert are_disjoint(splits)
    assert splits.num_ambiguous == len(splits.train) // 2
    inputs = [Text(text) for i in range(40) for text in (f"The {i}", f"the  {i}")]
    near = split_examples({"": inputs}, validation=0.1, test=0.2)
    assert (near.num_duplicates, near.num_ambiguous, are_disjoint(near)) == (0, 0, True)


def test_named_splits_stay_and_train_loses_what_leaks() -> None:
    examples_by_split = {
        "train": [Text("a"), Text("B "), Text("c"), Text("d")],
        "validation": [Text("d"), Text("x"), Text("Y")],
        "test": [Text("b"), Text("y"), Text("y")],
    }
    splits = split_examples(examples_by_split)
    assert [[e.source_text() for e in p] for p in (splits.train, splits.validation, splits.test)] == [
        ["a", "c"], ["d", "x"], ["b", "y"],
    ]  # fmt: skip
    assert (splits.num_duplicates, splits.num_leaks) == (1, 3)
    assert str(splits) == "train 2, validation 2, test 2, duplicates removed: 1, leaks removed: 3"


def test_a_missing_split_is_taken_from_what_may_be_trained_on() -> None:
    examples_by_split = {"train": labeled(90), "": labeled(100), "test": [LabeledText("other", "a")]}
    splits = split_examples(examples_by_split, validation=0.1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 1)
    assert splits.num_duplicates == 90


def test_the_majority_needs_a_small_closed_set() -> None:
    chats = [one_turn_chat(f"q {i}", "yes" if i % 4 else "no") for i in range(100)]
    assert split_examples({"": chats}, validation=0, test=20).majority_accuracy == pytest.approx(0.75, abs=0.2)
    assert split_examples({"": [one_turn_chat(f"q {i}", f"a {i}") for i in range(200)]}).majority_accuracy is None
    assert split_examples({"": [Text(f"t {i}") for i in range(200)]}).majority_accuracy is None
    assert split_examples({"": chats}, test=0).majority_accuracy is None


@pytest.mark.parametrize(
    ("examples_by_split", "options", "message"),
    [
        ({"test": labeled(3)}, {}, "the train split is empty"),
        ({"train": labeled(3), "test": labeled(3)}, {}, "all 3 training examples are also in validation"),
        ({"": labeled(10)}, {"test": 8}, "8 examples for test are more than half of the 10"),
        ({"": labeled(10)}, {"test": -1}, "test is -1; expected a fraction"),
        ({"": [LabeledText("a", "x")]}, {"validation": 1, "test": 0}, "give a validation file"),
    ],
)
def test_what_cannot_be_split(
    examples_by_split: dict[str, list[Example]], options: dict[str, float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        split_examples(examples_by_split, **options)


def distinct_images(*counts: int) -> ImageSet:
    """`counts[k]` different images of class k."""
    labels = [k for k, n in enumerate(counts) for _ in range(n)]
    pixels = np.zeros((len(labels), 2, 2), dtype=np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = np.arange(len(labels)) % 256, np.arange(len(labels)) // 256
    return from_arrays(pixels, labels)


def test_classes_of_images_keep_their_proportions() -> None:
    images = distinct_images(300, 90, 60)
    splits = split_images(images, 0, test=45, limit=90)
    test, train = images.subset(splits.test), images.subset(splits.train)
    assert Counter(test.labels) == {0: 30, 1: 9, 2: 6}
    assert Counter(train.labels) == {0: 60, 1: 18, 2: 12}
    assert splits.majority_accuracy == 30 / 45
    assert not set(test.hashes) & set(train.hashes)


def test_the_test_images_depend_on_the_seed_and_not_on_how_many_are_trained_on() -> None:
    images = distinct_images(60, 60)
    small, large = split_images(images, 0, 20, limit=30), split_images(images, 0, 20)
    assert small.test == large.test
    assert len(large.train) == 100
    assert split_images(images, 0, 20, seed=1).test != small.test
    assert split_images(images, 0, 20, limit=30) == small


def test_the_limit_holds_for_train_and_validation() -> None:
    splits = split_images(distinct_images(60, 60), 6, 20, limit=30)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [24, 6, 20]


def test_at_most_a_third_of_the_images_is_taken() -> None:
    assert len(split_images(distinct_images(30, 30), 0, test=1000).test) == 20


def test_duplicates_of_images_count_once_and_are_never_in_two_splits() -> None:
    images = distinct_images(40, 40)
    doubled = images.subset([*range(80), *range(80), *range(40)])
    splits = split_images(doubled, 5, 26)
    assert splits.num_duplicates == 120
    hashes = [doubled.hashes[i] for split in (splits.train, splits.validation, splits.test) for i in split]
    assert len(hashes) == len(set(hashes)) == 80


def test_duplicates_of_images_take_their_most_frequent_label() -> None:
    pixels = np.repeat(np.arange(12, dtype=np.uint8)[:, None, None], 2, axis=1).repeat(2, axis=2)
    images = from_arrays(np.concatenate([pixels, pixels[:1], pixels[:1]]), [0, 1] * 6 + [1, 1])
    splits = split_images(images, 0, 4)
    labels = {images.hashes[i]: images.labels[i] for i in (*splits.train, *splits.test)}
    assert splits.num_duplicates == 2
    assert labels[images.hashes[0]] == 1


def test_small_classes_are_never_tested_on_without_being_trained_on() -> None:
    for count in (1, 2):
        images = distinct_images(100, count)
        assert 1 in images.subset(split_images(images, test=33).train).labels


def test_named_splits_of_images_are_respected_and_cleaned(tmp_path: Path) -> None:
    folder(tmp_path / "train", each=6)
    folder(tmp_path / "val", each=2, first=100)
    folder(tmp_path / "test", each=3, first=200)
    (tmp_path / "train" / "red" / "leak.png").write_bytes((tmp_path / "test" / "red" / "0.png").read_bytes())
    (tmp_path / "train" / "red" / "twice.png").write_bytes((tmp_path / "train" / "red" / "0.png").read_bytes())
    (tmp_path / "train" / "red" / "other.png").write_bytes((tmp_path / "val" / "red" / "0.png").read_bytes())
    images = load_images(tmp_path)
    splits = split_images(images)
    assert {name: {images.splits[i] for i in getattr(splits, name)} for name in ("train", "validation", "test")} == {
        "train": {"train"}, "validation": {"validation"}, "test": {"test"},
    }  # fmt: skip
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [18, 6, 9]
    assert (splits.num_duplicates, splits.num_leaks) == (1, 2)


def test_a_train_folder_that_is_the_test_folder_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "train", each=3)
    folder(tmp_path / "test", each=3)
    with pytest.raises(DataError, match="nothing is left"):
        split_images(load_images(tmp_path))
