"""Probabilities of the t and chi-squared distributions and of the studentized range, for tests of significance.

The incomplete beta function is the continued fraction of Lentz (Press et al., Numerical Recipes, 6.4); the studentized
range is for known variance (infinite degrees of freedom), as Nemenyi's test takes it. It knows no data. Written by
hand: nothing else in kitout needs scipy, and these functions are no reason to require it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

STEPS = 200  # of the continued fraction; it needs about sqrt(max(a, b))
TINY = 1e-300


def t_p_value(t: float, degrees: float) -> float:
    """Two-sided: how often |T| is at least |t|. degrees: infinite for the normal distribution."""
    if math.isinf(t):
        return 0.0
    if math.isinf(degrees):
        return math.erfc(abs(t) / math.sqrt(2))
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


@lru_cache(maxsize=256)
def t_quantile(probability: float, degrees: float) -> float:
    """The t with P(T <= t) = probability, which is at least 0.5; infinite degrees give the normal quantile."""
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"expected 0.5 <= probability < 1 and degrees >= 1, found {probability} and {degrees}")
    if math.isinf(degrees):
        return _solve(lambda t: math.erfc(t / math.sqrt(2)) / 2, 1 - probability)
    return _solve(lambda t: t_p_value(t, degrees) / 2, 1 - probability)


def chi2_tail(value: float, degrees: int) -> float:
    """P(chi-squared >= value), a finite sum for whole degrees (Abramowitz and Stegun 26.4.4 and 26.4.5)."""
    half = max(0.0, value) / 2
    start = 1 if degrees % 2 else 2
    total = math.erfc(math.sqrt(half)) if start == 1 else math.exp(-half)
    for k in range(start, degrees, 2):
        total += math.exp(k / 2 * math.log(half) - half - math.lgamma(k / 2 + 1)) if half else 0.0
    return min(1.0, total)


@lru_cache(maxsize=64)
def range_quantile(probability: float, num_groups: int) -> float:
    """The quantile of the range of `num_groups` standard normal values."""
    if num_groups < 2:
        raise ValueError(f"a range needs at least 2 values, found {num_groups}")
    points = np.linspace(-9.0, 9.0, 721)
    density = np.exp(-(points**2) / 2) / math.sqrt(2 * math.pi) * (points[1] - points[0])
    below = _normal_cdf(points)

    def tail(width: float) -> float:
        return 1 - num_groups * float(density @ (_normal_cdf(points + width) - below) ** (num_groups - 1))

    return _solve(tail, 1 - probability)


def _normal_cdf(values: np.ndarray) -> np.ndarray:
    return np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in values.tolist()])


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that changes its sign between low and high is 0, to 13 digits (Ridders 1979)."""
    at_low, at_high = function(low), function(high)
    last = math.inf
    for _ in range(STEPS):
        middle = (low + high) / 2
        at_middle = function(middle)
        scale = math.sqrt(at_middle * at_middle - at_low * at_high)
        if not scale:
            return middle
        x = middle + (middle - low) * math.copysign(1.0, at_low - at_high) * at_middle / scale
        if abs(x - last) <= 1e-13 * abs(x):
            return x
        last, at_x = x, function(x)
        if not at_x:
            return x
        points = sorted([(low, at_low), (middle, at_middle), (x, at_x), (high, at_high)])
        change = next(i for i in range(3) if points[i][1] * points[i + 1][1] <= 0)
        (low, at_low), (high, at_high) = points[change : change + 2]
    return last


def _solve(tail: Callable[[float], float], target: float) -> float:
    """Where a falling function of a number >= 0 is at its target."""
    low, high = 0.0, 1.0
    while tail(high) > target:
        low, high = high, 2 * high
    return root(lambda x: math.log(max(tail(x), TINY) / target), low, high)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b); a, b > 0 and 0 <= x <= 1."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):
        return math.exp(log_front) * _beta_fraction(a, b, x) / a
    return 1 - math.exp(log_front) * _beta_fraction(b, a, 1 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    numerator, denominator = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = denominator
    for m in range(1, STEPS + int(4 * math.sqrt(max(a, b)))):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            denominator = 1 / _not_zero(1 + factor * denominator)
            numerator = _not_zero(1 + factor / numerator)
            change = denominator * numerator
            value *= change
        if abs(change - 1) < 1e-15:
            break
    return value


def _not_zero(value: float) -> float:
    return value if abs(value) > TINY else TINY
