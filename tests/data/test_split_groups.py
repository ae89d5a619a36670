"""Examples in groups: a group is in one split, whatever joins it to others, and splits have about their size."""

from __future__ import annotations

import random

import pytest

from kitout.data.examples.examples import LabeledText
from kitout.data.split import Splits, split_examples
from kitout.data.split_groups import find_units, sample_units
from kitout.errors import DataError


def questions(sizes: list[int], seed: int = 0) -> list[LabeledText]:
    rng = random.Random(seed)
    rows = [
        LabeledText(text=f"question {k} of {g}", label=rng.choice("ab"), group=f"p{g}")
        for g, size in enumerate(sizes)
        for k in range(size)
    ]
    rng.shuffle(rows)
    return rows


def groups_of(splits: Splits) -> list[set[str]]:
    return [{e.group for e in split} for split in (splits.train, splits.validation, splits.test)]


@pytest.mark.parametrize("sizes", [[10] * 30, [1] * 100, [random.Random(1).randint(1, 30) for _ in range(40)]])
def test_groups_stay_whole_and_splits_have_their_size(sizes: list[int]) -> None:
    rows = questions(sizes)
    splits = split_examples({"": rows}, validation=0.1, test=0.2, seed=3)
    train, validation, test = groups_of(splits)
    assert not train & validation
    assert not (train | validation) & test
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == len(rows)
    assert abs(len(splits.test) - 0.2 * len(rows)) <= max(sizes) / 2
    assert abs(len(splits.validation) - 0.1 * len(rows)) <= max(sizes) / 2
    assert splits == split_examples({"": rows}, validation=0.1, test=0.2, seed=3)
    assert splits != split_examples({"": rows}, validation=0.1, test=0.2, seed=4)


def test_equal_inputs_join_groups() -> None:
    rows = [LabeledText(text=f"{g} {k}", label="x", group=f"p{g}") for g in range(12) for k in range(4)]
    for g in range(0, 12, 2):  # each even passage shares a question with the next one, but for its case
        rows += [
            LabeledText(text=f"Shared {g}", label="x", group=f"p{g}"),
            LabeledText(text=f"shared {g}", label="y", group=f"p{g + 1}"),
        ]
    for seed in range(5):
        splits = split_examples({"": rows}, validation=0, test=20, seed=seed)
        train, _, test = groups_of(splits)
        assert not train & test
        assert not {e.input_key for e in splits.train} & {e.input_key for e in splits.test}
        assert 10 <= len(splits.test) <= 30


def test_a_chain_of_equal_inputs_and_groups_is_one_unit() -> None:
    units = find_units([("a", "1"), ("b", "1"), ("b", "2"), ("c", "2"), ("d", "3"), ("e", ""), ("f", "")])
    assert len({units[key] for key in "abc"}) == 1
    assert len({units[key] for key in "adef"}) == 4


def test_each_label_keeps_its_share_where_groups_have_one_label() -> None:
    pool = [(g, "ab"[g % 4 == 0]) for g in range(80) for _ in range(5)]
    taken = sample_units(pool, 80, 0, lambda e: e[0], lambda e: e[1])
    labels = [pool[i][1] for i in taken]
    assert len(labels) == 80
    assert labels.count("b") == 20


def test_groups_of_a_given_test_split_are_not_trained_on() -> None:
    rows = questions([5] * 6)
    test = [LabeledText(text="another question", label="a", group="p2")]
    splits = split_examples({"train": rows, "test": test}, validation=0)
    assert "p2" not in groups_of(splits)[0]
    assert splits.num_leaks == 5
    with pytest.raises(DataError, match="all 5 training examples are of groups that are in"):
        split_examples({"train": questions([5]), "test": [LabeledText(text="x", label="a", group="p0")]})


def test_what_cannot_be_taken_whole_is_refused_with_a_number() -> None:
    with pytest.raises(DataError, match=r"the smallest of the 3 groups has 20; set data.test to 40 or more"):
        split_examples({"": questions([20, 20, 20])}, validation=0, test=6)
    with pytest.raises(DataError, match="1 different groups"):
        split_examples({"": questions([20])}, validation=0, test=6)
