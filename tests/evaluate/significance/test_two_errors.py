"""Two standard errors with degrees of freedom of their own: the test keeps its level at every mixture of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kitout.evaluate.intervals.distributions import t_p_value, t_quantile
from kitout.evaluate.significance.two_errors import LEAST_P, half_width, p_value

EXAMPLES = 299  # degrees of freedom


def false_alarms(alpha: float, num_seeds: int, ratio: float, times: int) -> float:
    """How often two equal methods differ. ratio: of the seeds' standard error to the examples'."""
    rng, of_seeds = np.random.default_rng(0), 2 * num_seeds - 2
    difference = rng.normal(0, math.hypot(1, ratio), times)
    seeds = ratio * np.sqrt(rng.chisquare(of_seeds, times) / of_seeds)
    examples = np.sqrt(rng.chisquare(EXAMPLES, times) / EXAMPLES)
    half = np.hypot(
        seeds * t_quantile(1 - alpha / 2, of_seeds), examples * t_quantile(1 - alpha / 2, EXAMPLES)
    )  # fmt: skip
    one = [(float(seeds[0]), of_seeds), (float(examples[0]), EXAMPLES)]
    assert half_width(1 - alpha / 2, one) == pytest.approx(half[0])
    return float((np.abs(difference) > half).mean())


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 91])
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_equal_methods_differ_no_more_often_than_they_may(num_seeds: int, alpha: float) -> None:
    times = 100_000 if alpha == 0.05 else 1_000_000
    found = {ratio: false_alarms(alpha, num_seeds, ratio, times) for ratio in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 20.0)}
    noise = 3 * math.sqrt(alpha / times)
    assert max(found.values()) <= alpha + noise, found
    assert min(found[0.0], found[20.0]) >= 0.9 * alpha - noise, "one part alone is Student's t"


@pytest.mark.parametrize("seeds", [0.0, 0.3, 1.0, 5.0])
def test_p_is_the_level_at_which_the_interval_ends_at_zero(seeds: float) -> None:
    errors = [(seeds, 4), (1.0, EXAMPLES)]
    for difference in (0.01, 0.5, 2.0, 3.5):
        p = p_value(difference, errors)
        assert half_width(1 - p / 2, errors) == pytest.approx(difference, rel=1e-8)
        assert p_value(-difference, errors) == p


def test_one_part_is_students_t() -> None:
    for difference in (0.1, 2.0, 9.0):
        assert p_value(difference, [(0.0, 4), (1.0, 30)]) == t_p_value(difference, 30)
        assert p_value(difference, [(1.0, 4), (0.0, 30)]) == t_p_value(difference, 4)
    assert (p_value(0.0, [(0.0, 4), (0.0, 9)]), p_value(0.1, [(0.0, 4), (0.0, 9)])) == (1.0, 0.0)


def test_far_out_it_is_an_upper_bound() -> None:
    assert p_value(1e3, [(1e-3, 4), (1.0, EXAMPLES)]) <= LEAST_P
    assert 0 < p_value(1e9, [(1.0, 4), (1.0, EXAMPLES)]) < 1e-30
