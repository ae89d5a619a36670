"""A metric that can be computed over any resample of its examples: that gives it an interval.

`Measure` is a metric as a function of the weight of each example; `Score` is its value and interval. Two measures of
the same examples give the interval of their difference, on the same resamples. It knows no task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitout.evaluate.metrics.interval import (
    WeightedMetric,
    bootstrap_interval,
    newcombe_interval,
    wilson_interval,
)


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
    note: str = ""
    """As in `Score`."""

    @property
    def value(self) -> float:
        return float(self.value_fn(np.ones(self.n)))

    def score(self, seed: int = 0) -> Score:
        """The value with its interval."""
        value = self.value
        low, high = self._interval(value, seed)
        return Score(value, low, high, self.n, self.higher_is_better, self.is_fraction, self.note)

    def _interval(self, value: float, seed: int) -> tuple[float, float]:
        if self.correct is not None:
            return wilson_interval(int(self.correct.sum()), self.n)
        if self.is_fraction and value in (0.0, 1.0):  # all resamples are equal: an interval of width 0
            return wilson_interval(round(value * self.n), self.n)
        return bootstrap_interval(self.value_fn, self.n, seed)


def score_difference(base: Measure, tuned: Measure, seed: int = 0) -> tuple[float, float, float]:
    """tuned minus base, and its 95 % interval, paired by example."""
    if base.n != tuned.n:
        raise ValueError(f"{base.n} and {tuned.n} examples cannot be compared one by one")
    value = tuned.value - base.value
    if base.correct is not None and tuned.correct is not None:
        return value, *newcombe_interval(base.correct, tuned.correct)
    return value, *bootstrap_interval(lambda weights: tuned.value_fn(weights) - base.value_fn(weights), base.n, seed)


def proportion(correct: NDArray[np.bool_]) -> Measure:
    """The fraction of correct examples."""
    return Measure(lambda weights: float(weights @ correct) / float(weights.sum()), len(correct), correct=correct)


def mean(values: NDArray[np.float64], *, higher_is_better: bool = True, is_fraction: bool = True) -> Measure:
    """The mean of one number per example."""
    return Measure(
        lambda weights: float(weights @ values) / float(weights.sum()), len(values), higher_is_better, is_fraction
    )


def from_sums(
    sums: NDArray[np.float64],
    formula: Callable[[NDArray[Any]], float],
    *,
    higher_is_better: bool = True,
    is_fraction: bool = True,
) -> Measure:
    """A metric of sums over the examples: sums is [n, k], the formula takes the k totals."""
    return Measure(lambda weights: float(formula(weights @ sums)), len(sums), higher_is_better, is_fraction)


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
