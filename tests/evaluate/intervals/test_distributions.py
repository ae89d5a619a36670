"""Quantiles and tails equal the tables that are printed in books, and scipy's where that is installed."""

from __future__ import annotations

import importlib.util
import math

import pytest

from kitout.evaluate.intervals.distributions import chi2_tail, range_quantile, t_p_value, t_quantile

needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.975, 30, 2.042), (0.8, 4, 0.941), (0.975, math.inf, 1.960), (0.5, 9, 0)],
)
def test_t_as_printed(probability: float, degrees: float, value: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(value, abs=6e-4)
    if value and degrees < math.inf:
        assert t_p_value(-t_quantile(probability, degrees), degrees) == pytest.approx(2 * (1 - probability), abs=1e-9)


def test_t_of_no_use() -> None:
    assert t_p_value(math.inf, 4) == 0
    assert t_p_value(0, 4) == 1
    for probability, degrees in ((0.4, 4), (1.0, 4), (0.9, 0)):
        with pytest.raises(ValueError, match="expected"):
            t_quantile(probability, degrees)


@pytest.mark.parametrize(
    ("value", "degrees", "tail"), [(3.841, 1, 0.05), (7.815, 3, 0.05), (18.307, 10, 0.05), (0, 3, 1)]
)
def test_chi_squared_as_printed(value: float, degrees: int, tail: float) -> None:
    assert chi2_tail(value, degrees) == pytest.approx(tail, abs=5e-5)


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (8, 3.031), (10, 3.164)])
def test_range_as_nemenyi_has_it(k: int, q: float) -> None:
    """Demsar 2006, table 5a: the studentized range at 0.05, divided by the root of 2."""
    assert range_quantile(0.95, k) / math.sqrt(2) == pytest.approx(q, abs=1.1e-3)
    with pytest.raises(ValueError, match="at least 2"):
        range_quantile(0.95, 1)


@needs_scipy
def test_all_as_scipy_has_them() -> None:
    from scipy import stats

    for degrees in (1, 2, 7, 99.5, 1e5):
        for value in (0.1, 2.5, 40.0):
            assert t_p_value(value, degrees) == pytest.approx(2 * stats.t.sf(value, degrees), abs=1e-10)
        assert t_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)
    for degrees in (1, 2, 5, 10, 41):
        assert chi2_tail(9.28, degrees) == pytest.approx(stats.chi2.sf(9.28, degrees), abs=1e-12)
    for k in (2, 5, 20):
        assert range_quantile(0.95, k) == pytest.approx(stats.studentized_range.ppf(0.95, k, math.inf), abs=1e-9)
