"""p-values of one paired difference, against the textbook."""

from __future__ import annotations

import importlib.util
import math
from fractions import Fraction

import numpy as np
import pytest

from kitout.evaluate.intervals.distributions import t_p_value
from kitout.evaluate.metrics.measure import from_sums, mean, proportion
from kitout.evaluate.significance.paired import mcnemar_p_value, paired_p_value


@pytest.mark.parametrize(
    ("only_first", "only_second", "expected"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 64), (1, 9, 22 / 1024), (3000, 3000, 1.0)],
)
def test_mcnemar_is_the_binomial(only_first: int, only_second: int, expected: float) -> None:
    assert mcnemar_p_value(only_first, only_second) == pytest.approx(expected, abs=1e-9)
    assert mcnemar_p_value(only_second, only_first) == pytest.approx(expected, abs=1e-9)


def test_equal_models_differ_in_one_case_of_twenty() -> None:
    rng, false_alarms = np.random.default_rng(0), {"share": 0, "mean": 0, "groups": 0}
    for _ in range(400):
        common = rng.normal(size=200)
        rows = [common + rng.normal(size=200) for _ in range(2)]
        groups = np.repeat(np.arange(20), 10)
        of_groups = [np.repeat(rng.normal(size=20), 10) + row for row in rows]
        false_alarms["share"] += paired_p_value(*(proportion(row > 0) for row in rows)) <= 0.05
        false_alarms["mean"] += paired_p_value(*(mean(row, is_fraction=False) for row in rows)) <= 0.05
        grouped = [mean(row, is_fraction=False).grouped(groups) for row in of_groups]
        false_alarms["groups"] += paired_p_value(*grouped) <= 0.05
    assert all(count <= 0.075 * 400 for count in false_alarms.values()), false_alarms
    assert min(false_alarms.values()) >= 0.01 * 400


def test_without_a_difference_there_is_nothing_to_find() -> None:
    values = np.arange(6.0)
    assert paired_p_value(mean(values, is_fraction=False), mean(values, is_fraction=False)) == 1.0
    assert paired_p_value(mean(values, is_fraction=False), mean(values + 1, is_fraction=False)) == 0.0


def test_a_ratio_of_sums_is_normal() -> None:
    rng = np.random.default_rng(1)
    sums = [np.stack([rng.gamma(2.0, 1.0, 400), np.full(400, 2.0)], 1) for _ in range(2)]
    one, other = (from_sums(s, lambda t: float(t[0] / t[1]), is_fraction=False) for s in sums)
    p = paired_p_value(one, other)
    assert 0 < p <= 1
    assert math.isfinite(p)


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (3, 0), (5, 5), (7, 12), (40, 21), (600, 700)])
def test_shares_are_compared_by_the_binomial_test(counts: tuple[int, int]) -> None:
    lost, gained = counts
    tail = sum(math.comb(lost + gained, i) for i in range(min(counts) + 1))
    expected = float(min(Fraction(1), Fraction(2 * tail, 2 ** (lost + gained))))
    if importlib.util.find_spec("scipy") is not None and sum(counts):
        from scipy import stats

        assert stats.binomtest(lost, lost + gained).pvalue == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p_value(lost, gained) == pytest.approx(expected, rel=1e-9)
    base = np.array([True] * lost + [False] * gained + [True, False] * 5)
    tuned = np.array([False] * lost + [True] * gained + [True, False] * 5)
    assert paired_p_value(proportion(base), proportion(tuned)) == pytest.approx(expected, rel=1e-9)


def test_means_are_compared_by_the_t_distribution() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=400)
    tuned = base + 0.1 + 0.5 * rng.normal(size=400)
    found = paired_p_value(mean(base), mean(tuned))
    difference = tuned - base
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(400))
    assert found == pytest.approx(t_p_value(t, 399), rel=1e-9)
    assert paired_p_value(mean(base), mean(base)) == 1.0
    assert paired_p_value(mean(base[:1]), mean(tuned[:1])) == 1.0  # one example shows nothing
    assert paired_p_value(mean(np.zeros(2)), mean(np.array([1.0, 1.01]))) > 0.002  # 1 degree of freedom
