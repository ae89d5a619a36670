"""The p-value of one difference, paired by example: two models on the same test set.

Shares of correct examples by McNemar's exact test (1947), over the examples on which just one of the two is correct;
ratios of sums (losses, bits per byte) by the t distribution of their difference, with one degree of freedom less
than there are examples or, where they have them, groups. It knows measures, and no model.
"""

from __future__ import annotations

import math

from kitout.evaluate.intervals.distributions import t_p_value
from kitout.evaluate.intervals.resampled import SAME, Z95
from kitout.evaluate.metrics.measure import Measure, difference_error, score_difference


def paired_p_value(base: Measure, tuned: Measure, seed: int = 0) -> float:
    """Two-sided. seed: of the resampling, for a metric that is no ratio of sums."""
    if base.correct is not None and tuned.correct is not None and base.groups is None:
        only_base = int((base.correct & ~tuned.correct).sum())
        return mcnemar_p_value(only_base, int((tuned.correct & ~base.correct).sum()))
    difference, error = tuned.value - base.value, difference_error(base, tuned)
    if error is None:
        _, low, high = score_difference(base, tuned, seed)
        error = (high - low) / (2 * Z95)
    units = base.n if base.groups is None else int(base.groups.max()) + 1
    if units < 2 or not math.isfinite(difference):  # neither one example nor what is no number shows anything
        return 1.0
    if base.is_fraction and error <= SAME:  # all differ by the same: few that agree are not certain
        error = 1 / units
    if not error:
        return float(difference == 0)
    return t_p_value(difference / error, units - 1)


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Of the numbers of examples on which only the first, and only the second is correct: binomial, with p = 1/2."""
    n, k = only_first + only_second, min(only_first, only_second)
    # in logarithms: 2^-n underflows above 1,074
    tail = math.fsum(math.exp(_log_choose(n, i) - n * math.log(2)) for i in range(k + 1))
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
