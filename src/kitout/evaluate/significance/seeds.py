"""Two methods, each trained with several seeds, on the same test examples: the difference and what may be said of it.

From three seeds of each: the seeds' standard error, with t on Welch's degrees of freedom, at most 2 (S - 1), and that
of the paired examples, with t on theirs, square and add (`two_errors`). Over examples alone up to 22 % of equal methods
"differ", so about 5 % at most do, also where one varies more from seed to seed (tests/evaluate/significance). With
fewer seeds there is an interval over examples, and no verdict. It knows arrays of scores, and no training.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kitout.errors import ConfigError
from kitout.evaluate.intervals.ratio import Groups, Ratio, standard_error
from kitout.evaluate.intervals.resampled import SAME, agreement_reach
from kitout.evaluate.metrics.measure import (
    Measure,
    format_value,
    mean,
    number_groups,
    proportion,
    score_difference,
    size_text,
)
from kitout.evaluate.significance.power import POWER, SmallestDifference, smallest_difference
from kitout.evaluate.significance.two_errors import Errors, half_width, p_value

MIN_SEEDS = 3  # of each method, for a verdict
LEVEL = 0.05


@dataclass(frozen=True)
class MethodDifference:
    """One method against another. (The names are keys of results.json.)"""

    name: str
    """The method."""
    other: str
    """The one it is compared with."""
    difference: float
    """Mean score of `name` minus that of `other`, over seeds and examples."""
    low: float
    """Lower end of the difference's 95 % interval."""
    high: float
    """Upper end of it."""
    p_value: float | None
    """Of this pair alone, two-sided; None with too few seeds."""
    adjusted: float | None
    """The same after Holm's correction for `num_pairs` pairs."""
    num_pairs: int
    """How many pairs were compared; 1: this one alone."""
    num_seeds: tuple[int, int]
    """Of `name` and of `other`."""
    n: int
    """Test examples."""
    seed_error: float | None
    """Standard error of the difference over seeds; None with one seed."""
    example_error: float
    """Standard error of the difference over paired examples (or groups)."""
    seed_degrees: float | None = None
    """Degrees of freedom of the error over seeds; None with too few of them."""
    higher_is_better: bool = True
    """False for a loss or an error."""
    share: bool = True
    """A fraction, printed in percent."""
    num_groups: int | None = None
    """Groups that the examples are in, where whole groups were resampled."""

    @property
    def is_better(self) -> bool | None:
        """Whether `name` is better; None if the difference is not significant, or there is no verdict."""
        if self.adjusted is None or self.adjusted > LEVEL:
            return None
        return (self.difference > 0) == self.higher_is_better

    def reversed(self) -> MethodDifference:
        """`other` against `name`."""
        return replace(
            self, name=self.other, other=self.name, difference=-self.difference, low=-self.high, high=-self.low,
            num_seeds=self.num_seeds[::-1],
        )  # fmt: skip

    @property
    def smallest(self) -> SmallestDifference:
        """The smallest difference that these seeds and examples can show for this pair alone."""
        if self.seed_error is None or self.seed_degrees is None:
            return smallest_difference(self.example_error, self.n, share=self.share)
        errors = _errors(self.seed_error, self.seed_degrees, self.example_error, self.num_groups or self.n)
        return SmallestDifference(half_width(0.975, errors) + half_width(POWER, errors), self.n, self.share)

    @property
    def verdict(self) -> str:
        """better than ia3 by 2.3 points (0.5 to 4.1); 3 seeds, 1,000 test examples"""
        unit = " points" if self.share else ""
        low, high = (format_value(end, self.share, sign=True) for end in (self.low, self.high))
        seeds = " and ".join(str(s) for s in dict.fromkeys(self.num_seeds))
        plural = "" if self.num_seeds == (1, 1) else "s"
        size = f"{seeds} seed{plural}, {size_text(self.n, self.num_groups)}"
        if self.p_value is None:
            return (
                f"no verdict against {self.other}: {format_value(self.difference, self.share, sign=True)}{unit} "
                f"({low} to {high} over these examples alone); {size}, and {MIN_SEEDS} seeds of each are needed"
            )
        pairs = f" after Holm over {self.num_pairs} pairs" if self.num_pairs > 1 else ""
        if self.is_better is None:
            return f"no significant difference to {self.other}{pairs} ({low} to {high}{unit}); {size}"
        interval = " to ".join(format_value(end, self.share) for end in sorted((abs(self.low), abs(self.high))))
        amount = f"{format_value(abs(self.difference), self.share)}{unit}"
        return f"{'better' if self.is_better else 'worse'} than {self.other} by {amount} ({interval}){pairs}; {size}"


def compare_methods(
    scores: ArrayLike, others: ArrayLike, *, names: tuple[str, str] = ("the first", "the second"),
    groups: Sequence[Hashable] | NDArray[Any] | None = None, weights: ArrayLike | None = None,
    higher_is_better: bool = True, share: bool = True, linearized: bool = False, seed: int = 0,
) -> MethodDifference:  # fmt: skip
    """The first minus the second, on the same examples in the same order.

    scores, others: [seeds, examples], each the score of one example (1 where it is correct; its loss); [examples] is
    one seed. groups: the group of each example, by any values. weights: of each example in the mean (its tokens).
    share: scores lie between 0 and 1. linearized: only their means do (`ExampleScores.per_example` of an F1). seed: of
    the resampling, used with fewer than three seeds.
    """
    is_bounded = share and not linearized
    a, b = check_scores(names[0], scores, is_bounded), check_scores(names[1], others, is_bounded)
    n = a.shape[1]
    if b.shape[1] != n:
        raise ConfigError(f"{names[0]} has {n} examples, {names[1]} {b.shape[1]}: both need the same, in one order")
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (n,) or not np.isfinite(w).all() or (w < 0).any() or not w.sum() > 0:
        raise ConfigError(f"weights: expected {n} numbers of at least 0, and not all of them 0")
    numbers = None if groups is None else number_groups(groups, n)
    means, other_means = a @ w / w.sum(), b @ w / w.sum()
    difference = float(means.mean() - other_means.mean())
    example_error = _example_error(a.mean(axis=0) - b.mean(axis=0), w, numbers, share)
    seeds = (len(a), len(b))
    variances = [float(one.var(ddof=1)) / len(one) for one in (means, other_means) if len(one) > 1]
    seed_error = math.sqrt(sum(variances)) if len(variances) == 2 else None
    p, degrees = None, None
    if min(seeds) >= MIN_SEEDS and seed_error is not None:
        degrees = seed_degrees((variances[0], variances[1]), seeds)
        errors = _errors(seed_error, degrees, example_error, n if numbers is None else int(numbers.max()) + 1)
        half, p = half_width(0.975, errors), p_value(difference, errors)
        low, high = difference - half, difference + half
    else:
        measures = [_measure(one.mean(axis=0), w, is_bounded, numbers) for one in (b, a)]
        _, low, high = score_difference(measures[0], measures[1], seed)
        if share and high - low <= SAME:  # linearized: it has no bounds of its own
            reach = agreement_reach(n if numbers is None else int(numbers.max()) + 1)
            low, high = low - reach, high + reach
    if share:  # by as much as shares can differ
        low, high = max(-1.0, low), min(1.0, high)
    return MethodDifference(
        names[0], names[1], difference, low, high, p, p, 1, seeds, n, seed_error, example_error, degrees,
        higher_is_better, share, None if numbers is None else int(numbers.max()) + 1,
    )  # fmt: skip


def check_scores(name: str, scores: ArrayLike, share: bool) -> NDArray[np.float64]:
    """As [seeds, examples] of finite numbers. ConfigError says of which method."""
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if table.ndim != 2 or not table.size:
        raise ConfigError(f"{name}: expected scores [seeds, examples], found {list(np.shape(scores))}")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise ConfigError(f"{name}: example {column} of seed number {row} is {table[row, column]}, not finite")
    if share and (table.min() < 0 or table.max() > 1):
        raise ConfigError(f"{name}: scores from {table.min():.4g} to {table.max():.4g} are no fractions: share=False")
    return table


def seed_degrees(variances: tuple[float, float], num_seeds: tuple[int, int]) -> float:
    """Welch's degrees of freedom, of the variances of two means; at most as many as with the fewer seeds of both.

    Estimated from few seeds they may be too many, which matters where the numbers of seeds differ.
    """
    most = 2 * (min(num_seeds) - 1)
    parts = sum(one**2 / (number - 1) for one, number in zip(variances, num_seeds, strict=True))
    return min(most, sum(variances) ** 2 / parts) if parts else most


def _errors(seed_error: float, degrees: float, example_error: float, num_units: int) -> Errors:
    """num_units: examples, or groups of them."""
    return (seed_error, degrees), (example_error, max(1, num_units - 1))


def _example_error(
    differences: NDArray[np.float64], weights: NDArray[np.float64], groups: Groups | None, share: bool
) -> float:
    """Of shares it is never 0: as if one more example (or group) differed."""
    influence = Ratio(differences * weights, weights).by_group(groups).influence()
    error = standard_error(influence)
    return math.hypot(error, 1 / len(influence)) if share else error


def _measure(scores: NDArray[np.float64], weights: NDArray[np.float64], share: bool, groups: Groups | None) -> Measure:
    is_plain = bool((weights == weights[0]).all())
    if share and is_plain and np.isin(scores, (0.0, 1.0)).all():
        measure = proportion(scores == 1)
    elif is_plain:
        measure = mean(scores, is_fraction=share)
    else:
        ratio = Ratio(scores * weights, weights)
        measure = Measure(
            lambda drawn: float(drawn @ ratio.numerators) / float(drawn @ weights), len(scores), is_fraction=share,
            ratio=ratio,
        )  # fmt: skip
    return measure if groups is None else measure.grouped(groups)
