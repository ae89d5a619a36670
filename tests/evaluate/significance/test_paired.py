"""Paired p-values equal the exact binomial test (scipy's, where it is), and the t test of a difference of ratios."""

from __future__ import annotations

import importlib.util
import math
from fractions import Fraction

import numpy as np
import pytest

from kitout.evaluate.metrics.measure import mean, proportion
from kitout.evaluate.significance.paired import mcnemar_p_value, paired_p_value


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (3, 0), (5, 5), (7, 12), (40, 21), (600, 700), (3000, 2800)])
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
    z = difference.mean() / (difference.std(ddof=1) / math.sqrt(400))
    assert found == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=0.02)
    assert paired_p_value(mean(base), mean(base)) == 1.0
    assert paired_p_value(mean(base[:1]), mean(tuned[:1])) == 1.0  # one example shows nothing
    assert paired_p_value(mean(np.zeros(2)), mean(np.array([1.0, 1.01]))) > 0.002  # 1 degree of freedom
