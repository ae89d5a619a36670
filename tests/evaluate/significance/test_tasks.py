"""Ranks over tasks as published by Demsar 2006, and as scipy has Friedman's test."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from kitout.errors import ConfigError
from kitout.evaluate.significance.tasks import critical_difference, rank_over_tasks

needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")

# Demsar 2006, table 6: AUC of C4.5 and three variants on 14 data sets
DEMSAR = {
    "C4.5": (0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661, 0.583, 0.775, 1.000, 0.940, 0.619, 0.972, 0.957),
    "C4.5+m": (0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1.000, 0.962, 0.666, 0.981, 0.978),
    "C4.5+cf": (0.771, 0.590, 0.968, 0.654, 0.886, 0.916, 0.609, 0.563, 0.866, 1.000, 0.965, 0.614, 0.9751, 0.946),
    "C4.5+m+cf": (0.798, 0.569, 0.967, 0.657, 0.898, 0.931, 0.685, 0.625, 0.875, 1.000, 0.962, 0.669, 0.975, 0.970),
}


def test_as_published() -> None:
    ranking = rank_over_tasks(DEMSAR)
    ranks = dict(zip(ranking.names, ranking.mean_ranks, strict=True))
    assert ranks == pytest.approx({"C4.5": 3.143, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}, abs=5e-4)
    assert ranking.critical_difference == pytest.approx(1.25, abs=5e-3)
    assert ranking.is_significant
    # as the paper says: the best and the worst are closer than that, so Nemenyi's test finds no pair
    assert ranking.groups == (("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"),)
    assert "no significant difference between C4.5+m+cf and C4.5+m and C4.5+cf and C4.5" in ranking.verdict
    assert rank_over_tasks(DEMSAR) == ranking


def test_critical_differences_as_published() -> None:
    assert critical_difference(4, 14) == pytest.approx(2.569 * (4 * 5 / (6 * 14)) ** 0.5, abs=1e-3)
    assert critical_difference(10, 30) == pytest.approx(3.164 * (10 * 11 / (6 * 30)) ** 0.5, abs=1e-3)


@needs_scipy
def test_friedman_as_scipy_has_it() -> None:
    from scipy.stats import friedmanchisquare

    rng = np.random.default_rng(0)
    rounded = {name: np.round(rng.random(9), 1) for name in "abcde"}  # with ties
    for scores in (DEMSAR, rounded):
        ranking, expected = rank_over_tasks(scores), friedmanchisquare(*scores.values())
        assert ranking.statistic == pytest.approx(expected.statistic, abs=1e-9)
        assert ranking.p_chi2 == pytest.approx(expected.pvalue, abs=1e-9)


def test_friedman_without_ties_by_its_formula() -> None:
    rng = np.random.default_rng(1)
    scores = {name: rng.random(8) for name in "abcd"}
    ranking = rank_over_tasks(scores)
    squares = sum((rank - 2.5) ** 2 for rank in ranking.mean_ranks)
    assert ranking.statistic == pytest.approx(12 * 8 / (4 * 5) * squares)


@pytest.mark.parametrize(("num_methods", "num_tasks"), [(2, 5), (4, 5)])
def test_equal_methods_rarely_differ(num_methods: int, num_tasks: int) -> None:
    rng = np.random.default_rng(2)
    found = [
        rank_over_tasks({str(k): rng.normal(size=num_tasks) for k in range(num_methods)}).is_significant
        for _ in range(40)
    ]
    assert np.mean(found) <= 0.1


def test_a_method_that_is_always_last_is_found() -> None:
    rng = np.random.default_rng(3)
    scores = {"good": rng.normal(3, 1, 8), "fair": rng.normal(2.8, 1, 8), "poor": rng.normal(-9, 1, 8)}
    ranking = rank_over_tasks(scores)
    assert ranking.names[-1] == "poor"
    assert ranking.groups == (tuple(ranking.names[:2]),)
    losses = {name: -values for name, values in scores.items()}
    assert rank_over_tasks(losses, higher_is_better=False).names == ranking.names
    equal = rank_over_tasks({"a": [1.0] * 5, "b": [1.0] * 5})
    assert (equal.statistic, equal.p_value, equal.mean_ranks) == (0, 1, (1.5, 1.5))
    assert equal.verdict.startswith("no significant difference between the 2 methods (Friedman over 5 tasks")


def test_what_cannot_be_ranked() -> None:
    with pytest.raises(ConfigError, match="at least 5"):
        rank_over_tasks({"a": [1.0] * 4, "b": [2.0] * 4})
    with pytest.raises(ConfigError, match="a 5, b 6"):
        rank_over_tasks({"a": [1.0] * 5, "b": [2.0] * 6})
    with pytest.raises(ConfigError, match="finite"):
        rank_over_tasks({"a": [1.0] * 5, "b": [float("nan")] * 5})
