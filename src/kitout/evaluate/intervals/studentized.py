"""95 % intervals of ratios without bounds (losses, errors) and of their differences, by a studentized bootstrap.

A resample's distance from the value is divided by that resample's own standard error, and the interval follows from the
quantiles of these quotients (Efron and Tibshirani 1993, 12.5). That helps where values are skewed, and harms where
they are not: differences that are mostly 0, or have heavy tails. So each end is the farther of this and Student's.
Simulated in tests/evaluate/intervals/test_coverage.py. It knows no metric by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from kitout.evaluate.intervals.distributions import t_quantile
from kitout.evaluate.intervals.ratio import Groups, Ratio, Values, standard_error
from kitout.evaluate.intervals.resampled import NUM_RESAMPLES, resample_batches

LEAST_ERROR = 0.2  # of the whole set's standard error: a resample of nearly equal values says nothing


def ratio_interval(
    ratio: Ratio, groups: Groups | None = None, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """Of one ratio: the shape of its quotient's interval."""
    plain = Ratio(ratio.numerators, ratio.denominators)
    low, high = _interval([(1.0, plain.by_group(groups))], seed, num_resamples)
    if (ratio.numerators >= 0).all():  # of losses: of few texts the formula goes below what they can be
        low = max(low, 0.0)
    low, high = ratio.apply(np.array([low, high]))
    return float(low), float(high)


def ratio_difference_interval(
    before: Ratio, after: Ratio, groups: Groups | None = None, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:  # fmt: skip
    """Of after minus before, paired by example. One example (or group) bounds it in no direction."""
    if len(before.by_group(groups).numerators) < 2:
        return -math.inf, math.inf
    return _interval([(-1.0, before.by_group(groups)), (1.0, after.by_group(groups))], seed, num_resamples)


@np.errstate(over="ignore", invalid="ignore")  # values that are not finite give ends that are not
def _interval(terms: Sequence[tuple[float, Ratio]], seed: int, num_resamples: int) -> tuple[float, float]:
    """Of the sum of sign * ratio. Equal examples have an interval of width 0."""
    value = sum(sign * float(ratio.apply(np.array([ratio.quotient]))[0]) for sign, ratio in terms)
    influence = np.sum([sign * ratio.influence() for sign, ratio in terms], axis=0)
    n, error = len(influence), math.sqrt(float(influence @ influence))
    if not math.isfinite(error):
        return math.nan, math.nan
    if n < 2 or not error > 1e-12 * max(abs(ratio.quotient) for _, ratio in terms):
        return value, value
    distances, errors = (np.concatenate(p) for p in zip(*_resampled(terms, seed, num_resamples), strict=True))
    low, high = np.percentile(distances / np.maximum(errors, LEAST_ERROR * error), [2.5, 97.5])
    student = t_quantile(0.975, n - 1) * standard_error(influence)
    return value - max(float(high) * error, student), value + max(-float(low) * error, student)


def _resampled(
    terms: Sequence[tuple[float, Ratio]], seed: int, num_resamples: int
) -> Iterator[tuple[Values, Values]]:  # fmt: skip
    """Of each resample: its distance from the value, and its own standard error (of n, not of n - 1).

    With residuals e and denominators d of each example, a resample's quotient moves by m = sum e / sum d, and an
    example's influence is slope (e - m d) / sum d. The sum of its square needs the sums of e e, e d and d d alone.
    """
    x = np.stack([column for _, ratio in terms for column in (ratio.residuals, ratio.denominators)], axis=1)
    first, second = np.triu_indices(x.shape[1])
    products = x[:, first] * x[:, second] * np.where(first == second, 1.0, 2.0)
    table = np.concatenate([x, products], axis=1)
    for weights in resample_batches(len(x), seed, num_resamples):
        totals = weights @ table
        distance, factors = np.zeros(len(weights)), []
        for k, (sign, ratio) in enumerate(terms):
            e, d = totals[:, 2 * k], totals[:, 2 * k + 1]
            moved = np.divide(e, d, out=np.zeros_like(e), where=d > 0)
            quotients = ratio.quotient + moved
            distance += sign * (ratio.apply(quotients) - ratio.apply(np.array([ratio.quotient])))
            slope = np.divide(sign * ratio.slope(quotients), d, out=np.zeros_like(e), where=d > 0)
            factors += [slope, -slope * moved]
        c = np.stack(factors, axis=1)
        variance = np.sum(totals[:, x.shape[1] :] * c[:, first] * c[:, second], axis=1)
        yield distance, np.sqrt(np.maximum(variance, 0.0))
