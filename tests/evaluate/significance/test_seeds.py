"""Two methods over seeds: equal ones rarely differ, a planted difference is found, few seeds give no verdict."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kitout.errors import ConfigError
from kitout.evaluate.intervals.resampled import newcombe_interval
from kitout.evaluate.significance.seeds import MethodDifference, compare_methods, seed_degrees

Scores = NDArray[np.float64]


def method(
    rng: np.random.Generator, difficulty: Scores, num_seeds: int, seed_effect: float, skill: float = 0.0
) -> Scores:
    """Correct or not, [seeds, examples]: every seed shifts the logit of all examples."""
    shifts = skill + rng.normal(0, seed_effect, num_seeds)
    logits = difficulty + shifts[:, None] + rng.normal(0, 1, (num_seeds, len(difficulty)))
    return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def draw(i: int, skill: float = 0.0, num_seeds: int = 3, seed_effect: float = 0.15, n: int = 400) -> MethodDifference:
    rng = np.random.default_rng(i)
    difficulty = rng.normal(0, 1.5, n)
    return compare_methods(
        method(rng, difficulty, num_seeds, seed_effect, skill), method(rng, difficulty, num_seeds, seed_effect)
    )


@pytest.mark.parametrize(("num_seeds", "seed_effect"), [(3, 0.0), (3, 0.15), (5, 0.5)])
def test_two_equal_methods_rarely_differ(num_seeds: int, seed_effect: float) -> None:
    found = [draw(i, 0.0, num_seeds, seed_effect).is_better is not None for i in range(250)]
    assert np.mean(found) <= 0.06


@pytest.mark.parametrize(
    ("num_seeds", "spreads"),
    [((3, 3), (0.1, 0.0)), ((3, 3), (0.1, 0.03)), ((3, 10), (0.1, 0.1)), ((3, 10), (0.1, 0.02))],
)
def test_they_do_not_where_one_varies_more_or_has_more_seeds(
    num_seeds: tuple[int, int], spreads: tuple[float, float]
) -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(400):
        shared = rng.normal(0, 1, 100)
        a, b = (
            shared + rng.normal(0, sd, (s, 1)) + np.zeros((s, 100)) for s, sd in zip(num_seeds, spreads, strict=True)
        )
        found += compare_methods(a, b, share=False).is_better is not None
    assert found / 400 <= 0.08


def test_degrees_of_the_seeds() -> None:
    assert seed_degrees((1.0, 1.0), (3, 3)) == 4
    assert seed_degrees((1.0, 0.0), (3, 3)) == 2
    assert seed_degrees((0.0, 0.0), (3, 5)) == 4
    assert seed_degrees((1.0, 0.2), (3, 10)) == pytest.approx(1.44 / (1 / 2 + 0.04 / 9))
    assert seed_degrees((0.1, 1.0), (3, 10)) == 4  # not the 12 of ten seeds: those of the three may be few by chance


def test_a_planted_difference_is_found() -> None:
    found = [draw(i, skill=0.8, n=1000) for i in range(100)]
    assert np.mean([one.is_better is True for one in found]) >= 0.9
    assert np.mean([one.low <= one.difference <= one.high for one in found]) == 1


def test_the_smallest_difference_is_found_in_eighty_percent_of_cases() -> None:
    """With examples that differ, and seeds that do not: a difference of that size, planted as a shift of scores."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(300):
        base = rng.normal(0, 1, (3, 100))
        planted = compare_methods(base, rng.normal(0, 1, (3, 100)), share=False).smallest.value
        other = rng.normal(-planted, 1, (3, 100))
        found += compare_methods(base, other, share=False).is_better is True
    assert 0.6 <= found / 300 <= 0.9


def test_both_standard_errors_count() -> None:
    same = np.tile([1.0, 0.0, 1.0, 1.0], (3, 50))
    other = same.copy()
    other[:, ::8] = 0
    one = compare_methods(same, other)
    assert one.seed_error == 0
    assert one.smallest.value == pytest.approx((1.972 + 0.843) * one.example_error, rel=1e-3)
    assert one.high - one.difference == pytest.approx(1.972 * one.example_error, rel=1e-3)
    wide = compare_methods(np.array([[0.6] * 100, [0.4] * 100, [0.6] * 100]), np.full((3, 100), 0.5))
    assert wide.seed_error == pytest.approx(1 / 15)
    assert wide.example_error < 0.02
    assert wide.is_better is None
    assert wide.seed_degrees == 2, "the other method is the same with every seed"
    assert wide.high - wide.difference == pytest.approx(
        np.hypot(4.303 * wide.seed_error, 1.984 * wide.example_error), rel=1e-3
    )


def test_fewer_seeds_have_an_interval_and_no_verdict() -> None:
    a, b = np.array([1.0] * 80 + [0.0] * 20), np.array([1.0] * 50 + [0.0] * 50)
    one = compare_methods(a, b, names=("lora", "ia3"))
    assert (one.p_value, one.adjusted, one.is_better, one.seed_error) == (None, None, None, None)
    assert (one.low, one.high) == newcombe_interval(b, a)
    low, high = f"+{100 * one.low:.1f}", f"+{100 * one.high:.1f}"
    assert one.verdict == (
        f"no verdict against ia3: +30.0 points ({low} to {high} over these examples alone); 1 seed, 100 test examples, "
        "and 3 seeds of each are needed"
    )
    two = compare_methods(np.stack([a, a]), np.stack([b, b, b]))
    assert two.p_value is None
    assert "3 and 2" not in two.verdict
    assert "2 and 3 seeds" in two.verdict


def test_verdicts() -> None:
    better = draw(0, skill=1.2, n=1000)
    assert better.verdict.startswith("better than the second by ")
    assert better.verdict.endswith("3 seeds, 1,000 test examples")
    assert draw(0).verdict.startswith("no significant difference to the second (")
    rng = np.random.default_rng(1)
    base = rng.gamma(2, 1, (3, 200))
    loss = compare_methods(base + 0.5, base, higher_is_better=False, share=False)
    assert (loss.is_better, loss.difference) == (False, pytest.approx(0.5))
    assert loss.verdict.startswith("worse than the second by 0.5 (")


def test_groups_and_weights() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(20), 10)
    a = np.tile((rng.random(20) < 0.6)[groups].astype(float), (3, 1))
    b = np.tile((rng.random(20) < 0.6)[groups].astype(float), (3, 1))
    plain, grouped = compare_methods(a, b), compare_methods(a, b, groups=[f"p{g}" for g in groups])
    assert grouped.example_error > 2.5 * plain.example_error
    tokens = rng.integers(1, 50, 200)
    weighted = compare_methods(a, b, weights=tokens)
    assert weighted.difference == pytest.approx(float(((a - b) @ tokens).mean() / tokens.sum()))
    once = compare_methods(a[0] * 2, b[0], weights=tokens, share=False)
    assert once.low <= once.difference <= once.high


def test_equal_inputs_give_equal_results() -> None:
    assert draw(5) == draw(5)
    equal = compare_methods(np.ones((3, 10)), np.ones((3, 10)))
    assert (equal.p_value, equal.difference) == (1, 0)
    assert compare_methods([[0.5] * 4] * 3, [[0.5] * 4] * 3, share=False).p_value == 1


@pytest.mark.parametrize(
    ("scores", "others", "message"),
    [
        ([1.0, 0.0], [1.0], "2 examples"),
        ([], [], "expected scores"),
        ([1.0, float("nan")], [1.0, 0.0], "example 1 of seed number 0 is nan"),
        ([2.0, 0.0], [1.0, 0.0], "share=False"),
    ],
)
def test_what_cannot_be_compared(scores: list[float], others: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_methods(scores, others)
    with pytest.raises(ConfigError, match="weights"):
        compare_methods([1.0, 0.0], [1.0, 0.0], weights=[0, 0])


def test_linearized_scores_that_agree_on_few_examples_are_not_certain() -> None:
    scores = np.array([0.9, 1.2, -0.1, 0.4])  # of an F1: only their mean is a share
    one = compare_methods(scores, scores, linearized=True)
    assert (one.low, one.high) == pytest.approx((-0.4899, 0.4899), abs=1e-4)


@pytest.mark.parametrize(("num_seeds", "linearized"), [(3, False), (1, True)])
def test_shares_differ_by_one_hundred_points_at_most(num_seeds: int, linearized: bool) -> None:
    found = compare_methods(np.ones((num_seeds, 2)), np.zeros((num_seeds, 2)), linearized=linearized)
    assert found.low < found.high == 1.0
    found = compare_methods(np.ones((num_seeds, 2)), np.ones((num_seeds, 2)), linearized=linearized)
    assert -1.0 <= found.low == -found.high
