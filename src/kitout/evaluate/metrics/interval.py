"""How sure a figure is: intervals that cover 95 % of the time, for shares, for any figure, and for a difference.

A share of right answers has Wilson's interval (1927), which stays honest near 0 and 1 and for few examples; two shares
of the same examples have Newcombe's (1998). Anything else is bootstrapped: the examples are drawn anew, with
replacement, and the figure is taken again. It knows no metric. Kept by hand: scipy has Wilson's interval, but none for
the difference of two shares of the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964
NUM_RESAMPLES = 1000

Weights: TypeAlias = NDArray[np.float64]  # how often each example counts: all 1, or as a draw has it
WeightedMetric: TypeAlias = Callable[[Weights], float]


def wilson_interval(num_correct: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share."""
    if not 0 <= num_correct <= total or total == 0:
        raise ValueError(f"{num_correct} of {total} is no share")
    p, z2 = num_correct / total, Z95**2 / total
    middle, reach = p + z2 / 2, Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    return max(0.0, (middle - reach) / (1 + z2)), min(1.0, (middle + reach) / (1 + z2))


def newcombe_interval(before: NDArray[Any], after: NDArray[Any]) -> tuple[float, float]:
    """The 95 % confidence interval of the share of `after` less that of `before`, right or wrong example by example."""
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} examples cannot be compared one by one")
    total, old, new = len(before), int(before.sum()), int(after.sum())
    (low_old, high_old), (low_new, high_new) = wilson_interval(old, total), wilson_interval(new, total)
    p, q = old / total, new / total
    spread = math.sqrt(old * (total - old) * new * (total - new))
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    only_old, only_new = old - both, new - both
    tie = (both * neither - only_old * only_new) / spread if spread else 0.0
    down = _interval_reach(q - low_new, high_old - p, tie)
    up = _interval_reach(high_new - q, p - low_old, tie)
    return max(-1.0, q - p - down), min(1.0, q - p + up)


def _interval_reach(a: float, b: float, tie: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * tie * a * b + b * b))


def bootstrap_interval(
    metric: WeightedMetric, n: int, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of a figure over draws of n examples with replacement."""
    found = np.array([metric(times) for times in resample(n, seed, num_resamples)])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def resample(n: int, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Iterator[Weights]:
    """How often each of n examples is in each draw; the same for the same seed, so that two models share the draws."""
    dice = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield np.bincount(dice.integers(0, n, n), minlength=n).astype(np.float64)
