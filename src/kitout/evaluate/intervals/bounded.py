"""95 % intervals of ratios between 0 and 1 (means of fractions, F1, shares of groups) and of their differences.

As many independent yes-or-no examples as would give the same standard error: with that effective number the interval is
Wilson's, and two of them give Newcombe's of a difference, with the quantile of t for the number of groups (Dean and
Pagano 2015 have it for surveys). They hold near 0 and 1, where resampling is too narrow. It knows no metric by name.
"""

from __future__ import annotations

from kitout.evaluate.intervals.distributions import t_quantile
from kitout.evaluate.intervals.ratio import Groups, Ratio, standard_error
from kitout.evaluate.intervals.resampled import SAME, agreement_reach, combine_intervals, wilson_interval
from kitout.evaluate.intervals.studentized import ratio_difference_interval, ratio_interval


def bounded_interval(ratio: Ratio, groups: Groups | None = None, seed: int = 0) -> tuple[float, float]:
    """Of one ratio. Groups differ in size and in how much they agree: then each end is the farther of Wilson's and the
    studentized bootstrap's.
    """
    if groups is None:
        return _wilson(ratio)
    units = ratio.by_group(groups)
    (low, high), (below, above) = _wilson(units), ratio_interval(units, None, seed)
    return max(0.0, min(low, below)), min(1.0, max(high, above))


def _wilson(units: Ratio) -> tuple[float, float]:
    """With the effective number. Where all examples (or groups) are equal, each counts as one."""
    n, value = len(units.numerators), min(1.0, max(0.0, units.quotient))
    if n < 2:
        return 0.0, 1.0
    error = standard_error(units.influence())
    variance = value * (1 - value)
    effective = variance / error**2 if variance and error > 1e-12 else float(n)
    return wilson_interval(value * effective, effective, t_quantile(0.975, n - 1))


def bounded_difference_interval(
    before: Ratio, after: Ratio, groups: Groups | None = None, seed: int = 0
) -> tuple[float, float]:  # fmt: skip
    """Of after minus before, paired by example: each end is the farther of Newcombe's and the studentized bootstrap's.

    The former is too narrow where few examples differ and all in one direction, the latter where hardly any does. Where
    all differ by the same, or not at all, both may have width 0: then each end is at least `agreement_reach` away.
    """
    first, second = before.by_group(groups), after.by_group(groups)
    a, b = first.influence(), second.influence()
    p, q = first.quotient, second.quotient
    spread = float(a @ a) * float(b @ b)
    phi = float(a @ b) / spread**0.5 if spread else 0.0
    low, high = combine_intervals(p, _wilson(first), q, _wilson(second), phi)
    below, above = ratio_difference_interval(first, second, None, seed)
    if abs(a - b).max() <= SAME:
        reach = agreement_reach(len(a), t_quantile(0.975, len(a) - 1)) if len(a) > 1 else 1.0
        below, above = q - p - reach, q - p + reach
    return max(-1.0, min(low, below)), min(1.0, max(high, above))
