"""95 % confidence intervals: of a proportion, of any metric, and of a difference.

A proportion of correct answers has Wilson's interval (1927), which holds near 0 and 1 and for few examples; the
difference of two proportions over the same examples has Newcombe's (1998). Everything else is bootstrapped: examples
are resampled with replacement and the metric is computed again. It knows no metric. Written by hand: scipy has Wilson's
interval, but none for the paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964
NUM_RESAMPLES = 1000

Weights: TypeAlias = NDArray[np.float64]  # of each example: all 1, or its count in a resample
WeightedMetric: TypeAlias = Callable[[Weights], float]


def wilson_interval(num_correct: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion."""
    if not 0 <= num_correct <= total or total == 0:
        raise ValueError(f"{num_correct} of {total} is not a proportion")
    p, z2 = num_correct / total, Z95**2 / total
    center, half_width = p + z2 / 2, Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    return max(0.0, (center - half_width) / (1 + z2)), min(1.0, (center + half_width) / (1 + z2))


def newcombe_interval(before: NDArray[Any], after: NDArray[Any]) -> tuple[float, float]:
    """The 95 % confidence interval of the proportion of `after` minus that of `before`, paired by example."""
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} examples cannot be compared one by one")
    total, num_before, num_after = len(before), int(before.sum()), int(after.sum())
    low_before, high_before = wilson_interval(num_before, total)
    low_after, high_after = wilson_interval(num_after, total)
    p, q = num_before / total, num_after / total
    spread = math.sqrt(num_before * (total - num_before) * num_after * (total - num_after))
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    only_before, only_after = num_before - both, num_after - both
    phi = (both * neither - only_before * only_after) / spread if spread else 0.0
    below = _half_width(q - low_after, high_before - p, phi)
    above = _half_width(high_after - q, p - low_before, phi)
    return max(-1.0, q - p - below), min(1.0, q - p + above)


def _half_width(a: float, b: float, phi: float) -> float:
    """phi: correlation of the two answers over the examples."""
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def bootstrap_interval(
    metric: WeightedMetric, n: int, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of a metric over resamples of n examples with replacement."""
    values = np.array([metric(weights) for weights in resample(n, seed, num_resamples)])
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def resample(n: int, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Iterator[Weights]:
    """How often each of n examples is in each resample; equal for equal seeds, so that two models share them."""
    rng = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
