"""Intervals equal the published ones, and cover the truth as often as they say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kitout.evaluate.intervals.resampled import bootstrap_interval, newcombe_interval, resample, wilson_interval
from kitout.evaluate.metrics.measure import Measure, mean, proportion, score_difference
from kitout.evaluate.significance.paired import paired_p_value


def table(both: int, only_before: int, only_after: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    before = [1] * both + [1] * only_before + [0] * only_after + [0] * neither
    after = [1] * both + [0] * only_before + [1] * only_after + [0] * neither
    return np.array(before, dtype=bool), np.array(after, dtype=bool)


@pytest.mark.parametrize(
    ("num_correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (258, 400, 0.5970, 0.6904)],
)
def test_wilson(num_correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(num_correct, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("num_correct", "total"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_not_a_proportion(num_correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(num_correct, total)


@pytest.mark.parametrize(
    ("counts", "published"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 2635): the difference 0.2
        ((36, 2, 12, 0), (0.0569, 0.3404)),
        # Fagerland, Lydersen, Laake 2014 (Statistics in Medicine 33, 2850): -0.286, where phi is positive and corrected
        ((1, 7, 1, 12), (-0.507, -0.026)),
    ],
)
def test_newcombe_as_published(counts: tuple[int, int, int, int], published: tuple[float, float]) -> None:
    before, after = table(*counts)
    assert newcombe_interval(before, after) == pytest.approx(published, abs=5e-4)
    low, high = newcombe_interval(after, before)
    assert (-high, -low) == pytest.approx(newcombe_interval(before, after))


@pytest.mark.parametrize("shares", [(0.25, 0.25, 0.25, 0.25), (0.4, 0.05, 0.15, 0.4)])
def test_newcombe_of_few_examples_covers_as_often_as_it_says(shares: tuple[float, ...]) -> None:
    n, covered = 8, 0.0
    for counts in itertools.product(range(n + 1), repeat=4):  # the exact probability, over every table of 8
        if sum(counts) == n:
            low, high = newcombe_interval(*table(*counts))
            if low <= shares[2] - shares[1] <= high:
                ways = math.factorial(n) / math.prod(map(math.factorial, counts))
                covered += ways * math.prod(share**count for share, count in zip(shares, counts, strict=True))
    assert covered >= 0.93


@pytest.mark.parametrize("counts", [(0, 0, 60, 0), (60, 0, 0, 0), (0, 0, 0, 60), (0, 60, 0, 0), (1, 0, 0, 0)])
def test_newcombe_at_the_edges_has_a_width(counts: tuple[int, int, int, int]) -> None:
    before, after = table(*counts)
    low, high = newcombe_interval(before, after)
    value = float(after.mean() - before.mean())
    assert -1 <= low <= value <= high <= 1
    assert high - low > 0.02


@pytest.mark.parametrize("num_correct", [8, 4, 3, 0])
def test_agreement_on_few_examples_is_not_certain(num_correct: int) -> None:
    correct = np.arange(8) < num_correct
    reach = wilson_interval(0, 8)[1]
    assert reach == pytest.approx(0.3244, abs=1e-4)
    assert newcombe_interval(correct, correct) == (-reach, reach)
    for one in (mean(correct * 1.0), proportion(correct).grouped(range(8))):  # as many groups: with t's quantile
        assert score_difference(one, one) == pytest.approx((0, -0.4114, 0.4114), abs=1e-4)
    uneven = Measure(lambda weights: float(weights[:2].sum() > 0) / 2, 8)  # no ratio of sums
    assert score_difference(uneven, uneven) == (0, -reach, reach)


def test_groups_that_all_change_by_the_same_are_not_certain() -> None:
    groups = np.repeat(np.arange(4), 4)
    before, after = ((np.tile(np.arange(4), (4, 1)) < np.arange(4)[:, None] + k).ravel() for k in (0, 1))
    one, other = proportion(before).grouped(groups), proportion(after).grouped(groups)
    value, low, high = score_difference(one, other)
    assert (value, low < 0, high) == (0.25, True, pytest.approx(0.25 + 0.7169, abs=1e-3))
    assert paired_p_value(one, other) > 0.05


def test_newcombe_requires_the_same_examples() -> None:
    with pytest.raises(ValueError, match="3 and 2 examples"):
        newcombe_interval(np.ones(3), np.ones(2))


def test_a_paired_interval_is_narrower_than_two_unpaired_ones() -> None:
    before, after = table(60, 2, 10, 28)
    low, high = newcombe_interval(before, after)
    unpaired = wilson_interval(70, 100)[1] - wilson_interval(62, 100)[0]
    assert high - low < unpaired
    assert low > 0


def test_resamples_are_equal_for_equal_seeds_and_keep_n() -> None:
    first, same, other = (list(resample(20, seed, 5)) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first, same, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    assert all(weights.sum() == 20 for weights in first)


def test_bootstrap_of_a_mean_is_what_the_formula_gives() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(mean(values).value_fn, 400)
    half_width = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.03)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        before, after = rng.random(80) < 0.5, rng.random(80) < 0.7
        low, high = newcombe_interval(before, after)
        covered += low <= 0.2 <= high
        bootstrapped = bootstrap_interval(mean(after.astype(float)).value_fn, 80, seed=seed, num_resamples=200)
        covered += bootstrapped[0] <= 0.7 <= bootstrapped[1]
    assert covered >= 0.91 * 400


def test_a_measure_that_no_resample_changes_still_has_a_width() -> None:
    always = Measure(lambda weights: 1.0, 10)
    score = always.score()
    assert (score.low, score.high) == pytest.approx(wilson_interval(10, 10))


def test_difference_of_proportions_and_of_means() -> None:
    before, after = table(36, 2, 12, 0)
    value, low, high = score_difference(proportion(before), proportion(after))
    assert (value, low, high) == pytest.approx((0.2, 0.0569, 0.3404), abs=2e-4)
    value, low, high = score_difference(mean(before.astype(float)), mean(after.astype(float)))
    assert value == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.06, 0.34), abs=0.03)
    with pytest.raises(ValueError, match="one by one"):
        score_difference(proportion(before), proportion(after[:3]))
