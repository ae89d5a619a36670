"""95 % confidence intervals: of a proportion, of any metric, and of a difference.

A proportion of correct answers has Wilson's interval (1927), which holds near 0 and 1 and for few examples; the
difference of two proportions over the same examples has Newcombe's (1998, method 10). Other ratios of sums have files
of their own (`studentized`, `bounded`). Everything else is bootstrapped: examples, or whole groups, are resampled with
replacement and the metric is computed again. It knows no metric. Written by hand: scipy has Wilson's interval, but none
for the paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964
NUM_RESAMPLES = 1000
SAME = 1e-12  # differences of fractions up to this are of rounding
BATCH_VALUES = 500_000  # counts of resamples that are held at a time

Weights: TypeAlias = NDArray[np.float64]  # of each example: all 1, or its count in a resample
WeightedMetric: TypeAlias = Callable[[Weights], float]


def wilson_interval(num_correct: float, total: float, quantile: float = Z95) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion. quantile: of t, where its variance is estimated."""
    if not 0 <= num_correct <= total or total == 0:
        raise ValueError(f"{num_correct} of {total} is not a proportion")
    p, z2 = num_correct / total, quantile**2 / total
    center, half_width = p + z2 / 2, quantile * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    return max(0.0, (center - half_width) / (1 + z2)), min(1.0, (center + half_width) / (1 + z2))


def agreement_reach(units: int, quantile: float = Z95) -> float:
    """How far two shares may be apart that are equal on each of so many examples (or groups): few are not certain.

    Wilson's upper end of none that differs, as Newcombe's interval has it where all examples are correct under both.
    """
    return wilson_interval(0, units, quantile)[1]


def newcombe_interval(before: NDArray[Any], after: NDArray[Any]) -> tuple[float, float]:
    """The 95 % confidence interval of the proportion of `after` minus that of `before`, paired by example."""
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} examples cannot be compared one by one")
    total, num_before, num_after = len(before), int(before.sum()), int(after.sum())
    if (before == after).all():  # a correlation of 1 would make this certain
        reach = agreement_reach(total)
        return -reach, reach
    p, q = num_before / total, num_after / total
    spread = math.sqrt(num_before * (total - num_before) * num_after * (total - num_after))
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    only_before, only_after = num_before - both, num_after - both
    cross = float(both * neither - only_before * only_after)
    if cross > 0:  # corrected for continuity: without it 95 % may be 80 % on 8 examples
        cross = max(0.0, cross - total / 2)
    phi = cross / spread if spread else 0.0
    return combine_intervals(p, wilson_interval(num_before, total), q, wilson_interval(num_after, total), phi)


def combine_intervals(
    p: float, of_p: tuple[float, float], q: float, of_q: tuple[float, float], phi: float
) -> tuple[float, float]:  # fmt: skip
    """Newcombe's interval of q - p, from an interval of each. phi: correlation of the two over the examples."""
    below = _half_width(q - of_q[0], of_p[1] - p, phi)
    above = _half_width(of_q[1] - q, p - of_p[0], phi)
    return max(-1.0, q - p - below), min(1.0, q - p + above)


def _half_width(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def bootstrap_interval(
    metric: WeightedMetric, n: int, seed: int = 0, num_resamples: int = NUM_RESAMPLES,
    groups: NDArray[np.intp] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """The 2.5th and 97.5th percentile of a metric over resamples of n examples with replacement.

    groups: the group of each example, from 0; whole groups are resampled.
    """
    if groups is None:
        values = [metric(weights) for weights in resample(n, seed, num_resamples)]
    else:
        values = [metric(weights[groups]) for weights in resample(int(groups.max()) + 1, seed, num_resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def resample(n: int, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Iterator[Weights]:
    """How often each of n examples is in each resample; equal for equal seeds, so that two models share them."""
    for weights in resample_batches(n, seed, num_resamples):
        yield from weights


def resample_batches(n: int, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Iterator[Weights]:
    """The same resamples, many at a time: [resamples, n]."""
    rng = np.random.default_rng(seed)
    size = max(1, BATCH_VALUES // n)
    for start in range(0, num_resamples, size):
        rows = min(size, num_resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
