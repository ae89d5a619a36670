"""A metric that can be computed over any resample of its examples: that gives it an interval.

`Measure` is a metric as a function of the weight of each example; `Score` is its value and interval. Two measures of
the same examples give the interval of their difference, on the same resamples. It knows no task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitout.evaluate.intervals.bounded import bounded_difference_interval, bounded_interval
from kitout.evaluate.intervals.ratio import Groups, Ratio, standard_error
from kitout.evaluate.intervals.resampled import (
    SAME,
    WeightedMetric,
    agreement_reach,
    bootstrap_interval,
    newcombe_interval,
    wilson_interval,
)
from kitout.evaluate.intervals.studentized import ratio_difference_interval, ratio_interval
from kitout.format import format_number


@dataclass(frozen=True)
class Score:
    """The value of a metric with its 95 % confidence interval."""

    value: float
    """Over all examples."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Number of examples."""
    higher_is_better: bool = True
    """False for a loss or an error."""
    share: bool = True
    """A fraction between 0 and 1, printed in percent. (The name is a key of results.json.)"""
    note: str = ""
    """What was measured by what, where that depends on the data: "by character". Reports show it behind the name."""
    num_groups: int | None = None
    """Groups that the examples are in, where whole groups were resampled."""

    @property
    def size(self) -> str:
        """600 test examples in 50 groups"""
        return size_text(self.n, self.num_groups)


@dataclass(frozen=True, eq=False)
class Measure:
    """A metric over n examples, before its interval is computed."""

    value_fn: WeightedMetric
    """The metric, given the weight of each example."""
    n: int
    """Number of examples."""
    higher_is_better: bool = True
    """False for a loss or an error."""
    is_fraction: bool = True
    """Between 0 and 1, printed in percent."""
    correct: NDArray[np.bool_] | None = None
    """Which examples are correct, if the metric is the fraction of these."""
    ratio: Ratio | None = None
    """The metric as a ratio of two sums over the examples, if it is one."""
    groups: Groups | None = None
    """The group of each example, from 0, where examples of a group are not independent (questions about one text)."""
    note: str = ""
    """As in `Score`."""
    influence_fn: Callable[[], NDArray[np.float64]] | None = None
    """[n]: how far each example moves the value, linearized, where the metric is a mean of such ratios (macro-F1)."""

    @property
    def value(self) -> float:
        return float(self.value_fn(np.ones(self.n)))

    def grouped(self, groups: Sequence[Hashable] | NDArray[Any]) -> Measure:
        """The same metric with examples in groups, by any values. ValueError for fewer than two groups."""
        return replace(self, groups=number_groups(groups, self.n))

    def score(self, seed: int = 0) -> Score:
        """The value with its interval."""
        value = self.value
        low, high = self._interval(value, seed)
        return Score(value, low, high, self.n, self.higher_is_better, self.is_fraction, self.note, self.num_groups)

    @property
    def num_groups(self) -> int | None:
        """Groups of the examples; None: each stands for itself."""
        return None if self.groups is None else int(self.groups.max()) + 1

    def _interval(self, value: float, seed: int) -> tuple[float, float]:
        if self.correct is not None and self.groups is None:
            return wilson_interval(int(self.correct.sum()), self.n)
        if self.ratio is not None:
            return (
                bounded_interval(self.ratio, self.groups, seed)
                if self.is_fraction
                else ratio_interval(self.ratio, self.groups, seed)
            )
        if self.is_fraction and value in (0.0, 1.0):  # all resamples are equal: an interval of width 0
            units = self.num_groups or self.n
            return wilson_interval(round(value * units), units)
        return bootstrap_interval(self.value_fn, self.n, seed, groups=self.groups)


def size_text(n: int, num_groups: int | None = None) -> str:
    """600 test examples in 50 groups"""
    return f"{n:,} test example{'s' if n > 1 else ''}{f' in {num_groups:,} groups' if num_groups else ''}"


def number_groups(groups: Sequence[Hashable] | NDArray[Any], n: int) -> Groups:
    """Groups by any values -> the number of each example's group, in the order in which they come."""
    if len(groups) != n:
        raise ValueError(f"{len(groups)} groups for {n} examples: expected the group of each example")
    numbers: dict[Hashable, int] = {}
    values = groups.tolist() if isinstance(groups, np.ndarray) else groups
    found = np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.intp)
    if len(numbers) < 2:
        raise ValueError(f"all {n} examples are of one group ({next(iter(numbers), None)!r}): at least 2 are needed")
    return found


def score_difference(base: Measure, tuned: Measure, seed: int = 0) -> tuple[float, float, float]:
    """tuned minus base, and its 95 % interval, paired by example; by whole groups where the measures have them."""
    groups = _common_groups(base, tuned)
    value = tuned.value - base.value
    if groups is None and base.correct is not None and tuned.correct is not None:
        return value, *newcombe_interval(base.correct, tuned.correct)
    if base.ratio is not None and tuned.ratio is not None:
        if base.is_fraction and tuned.is_fraction:
            return value, *bounded_difference_interval(base.ratio, tuned.ratio, groups, seed)
        return value, *ratio_difference_interval(base.ratio, tuned.ratio, groups, seed)
    if base.n < 2:  # every resample is the same example
        return (value, -1.0, 1.0) if base.is_fraction and tuned.is_fraction else (value, -math.inf, math.inf)
    low, high = bootstrap_interval(
        lambda weights: tuned.value_fn(weights) - base.value_fn(weights), base.n, seed, groups=groups
    )
    if base.is_fraction and tuned.is_fraction and high - low <= SAME:
        reach = agreement_reach(base.num_groups or base.n)
        return value, max(-1.0, value - reach), min(1.0, value + reach)
    return value, low, high


@np.errstate(over="ignore", invalid="ignore")  # of losses that are not finite it is not finite either
def difference_error(base: Measure, tuned: Measure) -> float | None:
    """The standard error of tuned minus base, paired by example or group; None where the metric is no ratio of sums."""
    groups = _common_groups(base, tuned)
    if base.ratio is None or tuned.ratio is None:
        return None
    return standard_error(tuned.ratio.by_group(groups).influence() - base.ratio.by_group(groups).influence())


def _common_groups(base: Measure, tuned: Measure) -> Groups | None:
    if base.n != tuned.n:
        raise ValueError(f"{base.n} and {tuned.n} examples cannot be compared one by one")
    if base.groups is None and tuned.groups is None:
        return None
    if base.groups is None or tuned.groups is None or (base.groups != tuned.groups).any():
        raise ValueError("the two have different groups of examples: give both the same")
    return base.groups


def proportion(correct: NDArray[np.bool_]) -> Measure:
    """The fraction of correct examples."""
    ratio = Ratio(np.asarray(correct, dtype=np.float64), np.ones(len(correct)))
    return Measure(
        lambda weights: float(weights @ correct) / float(weights.sum()), len(correct), correct=correct, ratio=ratio
    )


def mean(values: NDArray[np.float64], *, higher_is_better: bool = True, is_fraction: bool = True) -> Measure:
    """The mean of one number per example."""
    return Measure(
        lambda weights: float(weights @ values) / float(weights.sum()), len(values), higher_is_better, is_fraction,
        ratio=Ratio(np.asarray(values, dtype=np.float64), np.ones(len(values))),
    )  # fmt: skip


def of_ratio(
    ratio: Ratio, *, higher_is_better: bool = True, is_fraction: bool = True, correct: NDArray[np.bool_] | None = None,
    groups: Groups | None = None, note: str = "",
) -> Measure:  # fmt: skip
    """A metric that is a ratio of two sums over the examples, and nothing else."""

    def value(weights: NDArray[np.float64]) -> float:
        total = float(weights @ ratio.denominators)
        return float(ratio.apply(np.array([safe_divide(float(weights @ ratio.numerators), total)]))[0])

    return Measure(value, len(ratio.numerators), higher_is_better, is_fraction, correct, ratio, groups, note)


def from_sums(
    sums: NDArray[np.float64],
    formula: Callable[[NDArray[Any]], float],
    *,
    higher_is_better: bool = True,
    is_fraction: bool = True,
    ratio: Ratio | None = None,
) -> Measure:
    """A metric of sums over the examples: sums is [n, k], the formula takes the k totals.

    ratio: the same metric as one, where it is: it then has the interval of a ratio.
    """
    return Measure(
        lambda weights: float(formula(weights @ sums)), len(sums), higher_is_better, is_fraction, ratio=ratio
    )


def safe_divide(numerator: float, denominator: float) -> float:
    """numerator / denominator; 0 if the denominator is 0."""
    return float(numerator / denominator) if denominator else 0.0


def nan_mean(values: NDArray[np.float64]) -> float:
    """The mean of the values that are not NaN; 0 if there are none."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else 0.0


def safe_sqrt(value: float) -> float:
    """The square root; 0 for a value that rounding moved below 0."""
    return math.sqrt(max(0.0, value))


def format_value(value: float, share: bool, sign: bool = False) -> str:
    """A fraction of 0.265 as 26.5; else four significant digits."""
    text = f"{100 * value:{'+' if sign else ''}.1f}" if share else format_number(value, sign)
    return text if "inf" in text or any(c in "123456789" for c in text) else text.lstrip("+-")
