"""Many methods: Holm's correction, rankings as letters, and twelve equal methods that stay equal."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from kitout.errors import ConfigError
from kitout.evaluate.significance.many import compact_letters, compare_pairs, holm, rank_methods


def test_holm_as_published() -> None:
    """As R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") has it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_of_eleven_equal_methods_against_a_default() -> None:
    """p-values of the normal distribution: any of them is below 0.05 in a third of cases, after Holm in at most 5 %."""
    rng, raw, corrected = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        means = rng.normal(size=12)
        p_values = [math.erfc(abs(one - means[0]) / 2) for one in means[1:]]  # the difference has variance 2
        raw += min(p_values) < 0.05
        corrected += min(holm(p_values)) <= 0.05
    assert 0.28 <= raw / 1000 <= 0.38
    assert corrected / 1000 <= 0.06


@pytest.mark.parametrize(
    ("names", "different", "letters"),
    [
        ("abc", [], ("a", "a", "a")),
        ("abc", ["ab", "ac", "bc"], ("a", "b", "c")),
        ("abc", ["ac"], ("a", "ab", "b")),
        ("abcd", ["ac", "ad", "bd"], ("a", "ab", "bc", "c")),
        ("abcd", ["ab"], ("a", "b", "ab", "ab")),
    ],
)
def test_letters_by_hand(names: str, different: list[str], letters: tuple[str, ...]) -> None:
    assert compact_letters(list(names), [frozenset(pair) for pair in different]) == letters


def test_letters_say_exactly_which_pairs_differ() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        names = list("abcdefg")
        different = [frozenset(pair) for pair in combinations(names, 2) if rng.random() < 0.4]
        letters = dict(zip(names, compact_letters(names, different), strict=True))
        for pair in map(frozenset, combinations(names, 2)):
            one, other = (set(letters[name]) for name in pair)
            assert bool(one & other) == (pair not in different)
    many = [f"m{i}" for i in range(30)]
    all_differ = compact_letters(many, [frozenset(pair) for pair in combinations(many, 2)])
    assert (all_differ[0], all_differ[26]) == ("a", "a1")


def equal_methods(i: int, num: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    difficulty = rng.normal(0, 1.5, 200)
    logits = difficulty + rng.normal(0, 0.3, (num, 3))[:, :, None]
    return {f"m{k}": (rng.random((3, 200)) < 1 / (1 + np.exp(-one))).astype(float) for k, one in enumerate(logits)}


def test_twelve_equal_methods_have_no_verdict() -> None:
    raw = corrected = 0
    for i in range(100):
        pairs = compare_pairs(equal_methods(i), "m0")
        assert len(pairs) == 11
        raw += any(one.p_value is not None and one.p_value < 0.05 for one in pairs)
        corrected += any(one.is_better is not None for one in pairs)
    assert raw / 100 > 0.08
    assert corrected / 100 <= 0.06


def test_a_ranking_of_three_groups() -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 0.1, 300)
    skills = {"low": 1.0, "top": 3.0, "middle": 2.0, "top too": 3.0}
    scores = {name: skill + shared + rng.normal(0, 0.05, (4, 300)) for name, skill in skills.items()}
    ranking = rank_methods(scores, share=False)
    assert set(ranking.names[:2]) == {"top", "top too"}
    assert ranking.names[2:] == ("middle", "low")
    assert ranking.letters == ("a", "a", "b", "c")
    assert len(ranking.pairs) == 6
    assert all(one.num_pairs == 6 and one.adjusted >= one.p_value for one in ranking.pairs)
    lines = ranking.text.split("\n")
    assert lines[3].split() == ["low", "0.9987", "c"] or lines[3].startswith("low ")
    assert "4 seeds of each, 300 test examples, Holm over 6 pairs" in lines[-1]
    assert "(80 % power)" in lines[-1]
    assert rank_methods(scores, share=False, higher_is_better=False).names[:2] == ("low", "middle")
    assert rank_methods(scores, share=False) == ranking


def test_without_seeds_there_is_an_order_and_no_ranking() -> None:
    ranking = rank_methods({"a": [1.0] * 30 + [0.0] * 10, "b": [1.0] * 5 + [0.0] * 35, "c": [[1.0] * 40] * 3})
    assert ranking.names == ("c", "a", "b")
    assert ranking.letters == ("", "", "")
    assert ranking.caption.startswith("no ranking: 1 to 3 seeds, and 3 of every method are needed")
    assert "after Holm over 3 pairs" in rank_methods(equal_methods(0, 3)).pairs[0].verdict


def test_what_cannot_be_ranked() -> None:
    with pytest.raises(ConfigError, match="at least 2 methods"):
        compare_pairs({"a": [1.0]})
    with pytest.raises(ConfigError, match="there is no method 'lorra' here"):
        compare_pairs({"lora": [1.0], "ia3": [0.0]}, "lorra")
