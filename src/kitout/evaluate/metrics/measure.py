"""A metric over one set of answers, ready to be taken over any draw of its examples: what gives it an interval.

`Measure` is a figure as a function of how often each example counts; `Score` is what comes of it. Two measures of the
same examples give the interval of their difference, on the same draws. It knows no task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitout.evaluate.metrics.interval import WeightedMetric, bootstrap_interval, newcombe_interval, wilson_interval


@dataclass(frozen=True)
class Score:
    """A figure and its 95 % interval over n examples. share: lies between 0 and 1, and is told in percent."""

    value: float
    low: float
    high: float
    n: int
    higher_is_better: bool = True
    share: bool = True


@dataclass(frozen=True, eq=False)
class Measure:
    """figure: over all n examples or a draw of them. right: for a share of right answers, which are right."""

    value_fn: WeightedMetric
    n: int
    higher_is_better: bool = True
    is_fraction: bool = True
    correct: NDArray[np.bool_] | None = None

    @property
    def value(self) -> float:
        return float(self.value_fn(np.ones(self.n)))

    def score(self, seed: int = 0) -> Score:
        """The figure with its interval."""
        value = self.value
        low, high = self._interval(value, seed)
        return Score(value, low, high, self.n, self.higher_is_better, self.is_fraction)

    def _interval(self, value: float, seed: int) -> tuple[float, float]:
        if self.correct is not None:
            return wilson_interval(int(self.correct.sum()), self.n)
        if self.is_fraction and value in (0.0, 1.0):  # every draw is the same, which would claim to be certain
            return wilson_interval(round(value * self.n), self.n)
        return bootstrap_interval(self.value_fn, self.n, seed)


def score_difference(base: Measure, tuned: Measure, seed: int = 0) -> tuple[float, float, float]:
    """tuned less base, and its 95 % interval, example by example."""
    if base.n != tuned.n:
        raise ValueError(f"{base.n} and {tuned.n} examples cannot be compared one by one")
    value = tuned.value - base.value
    if base.correct is not None and tuned.correct is not None:
        return value, *newcombe_interval(base.correct, tuned.correct)
    return value, *bootstrap_interval(lambda times: tuned.value_fn(times) - base.value_fn(times), base.n, seed)


def proportion(correct: NDArray[np.bool_]) -> Measure:
    """A share of right answers."""
    return Measure(lambda times: float(times @ correct) / float(times.sum()), len(correct), correct=correct)


def mean(values: NDArray[np.float64], *, higher_is_better: bool = True, is_fraction: bool = True) -> Measure:
    """The mean of one number an example."""
    return Measure(lambda times: float(times @ values) / float(times.sum()), len(values), higher_is_better, is_fraction)


def from_sums(
    sums: NDArray[np.float64],
    formula: Callable[[NDArray[Any]], float],
    *,
    higher_is_better: bool = True,
    is_fraction: bool = True,
) -> Measure:
    """A figure made of sums over the examples: sums is [n, k], the formula takes the k totals."""
    return Measure(lambda times: float(formula(times @ sums)), len(sums), higher_is_better, is_fraction)


def safe_divide(numerator: float, denominator: float) -> float:
    """above / below, 0 for 0 / 0."""
    return float(numerator / denominator) if denominator else 0.0


def nan_mean(values: NDArray[np.float64]) -> float:
    """The mean of what there is; 0 of nothing."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else 0.0


def safe_sqrt(value: float) -> float:
    """A square root that rounding below 0 does not break."""
    return math.sqrt(max(0.0, value))
