"""The smallest difference that a test set can show: found in 80 % of cases at the 5 % level.

It is (z of 0.975 + z of 0.8) = 2.8 standard errors of the difference (Miller 2024, "Adding Error Bars to Evals"); of
shares of correct examples 2.8 sqrt(discordant / n), where on the discordant share of examples just one of the two is
correct. It knows errors and numbers of examples, and no method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kitout.evaluate.intervals.distributions import t_quantile
from kitout.evaluate.intervals.resampled import Z95
from kitout.evaluate.metrics.measure import Measure, difference_error, format_value

POWER = 0.8


@dataclass(frozen=True)
class SmallestDifference:
    """What a comparison on given examples is able to find. (The names are keys of results.json.)"""

    value: float
    """The difference that is found with a power of 80 %; a share above 1 says that none is."""
    n: int
    """Number of examples."""
    share: bool = True
    """A fraction, printed in points."""

    @property
    def is_possible(self) -> bool:
        """Whether there are such differences: shares differ by 100 points at most."""
        return not (self.share and self.value > 1)

    @property
    def amount(self) -> str:
        """4.8 points; none where there is no such difference"""
        if not self.is_possible:
            return "none"
        return f"{format_value(self.value, self.share)}{' points' if self.share else ''}"

    @property
    def text(self) -> str:
        """4.8 points on 1,000 test examples"""
        return f"{self.amount} on {self.n:,} test example{'s' if self.n > 1 else ''}"


def smallest_lines(found: Sequence[tuple[str, SmallestDifference]]) -> list[str]:
    """For below a table of several models: of each metric the largest of these. A line for each number of examples."""
    largest: dict[tuple[int, str], SmallestDifference] = {}
    for name, one in found:
        known = largest.get((one.n, name))
        if math.isfinite(one.value) and (known is None or one.value > known.value):
            largest[one.n, name] = one
    sizes = dict.fromkeys(n for n, _ in largest)
    lines = [smallest_text([(name, one) for (n, name), one in largest.items() if n == size]) for size in sizes]
    return [line for line in lines if line]


def smallest_text(found: Sequence[tuple[str, SmallestDifference]]) -> str:
    """One line for below a table. found: the name of each metric, and its difference, all of the same examples."""
    found = [(name, one) for name, one in found if math.isfinite(one.value) and one.value > 0]
    if not found:
        return ""
    n = found[0][1].n
    examples = f"{n:,} test example{'s' if n > 1 else ''}"
    shown = ", ".join(f"{name} {one.amount}" for name, one in found if one.is_possible)
    none = ", ".join(name for name, one in found if not one.is_possible)
    texts = []
    if shown:
        texts += [
            f"smallest difference that {examples} can show (80 % power): {shown}",
            "a smaller one is often missed",
        ]
    if none:
        texts.append(f"{examples} can show no difference in {none}: it would have to exceed 100 points")
    return "; ".join(texts)


def smallest_difference(error: float, n: int, *, share: bool = True) -> SmallestDifference:
    """From the standard error of a difference over examples."""
    return SmallestDifference((t_quantile(0.975, math.inf) + t_quantile(POWER, math.inf)) * error, n, share)


def smallest_share_difference(discordant: float, n: int) -> SmallestDifference:
    """Of shares of correct examples, paired. discordant: the share of n examples on which just one is correct.

    Where there is none it is as if there were one example: agreement on few examples is not certain.
    """
    return smallest_difference(math.sqrt(max(discordant, 1 / n) / n), n)


def smallest_of_measures(base: Measure, tuned: Measure, interval: tuple[float, float]) -> SmallestDifference:
    """That of two measures over the same examples (or groups). interval: of their difference, by `score_difference`; it
    serves where the metric is no ratio of sums.
    """
    if base.correct is not None and tuned.correct is not None and base.groups is None:
        return smallest_share_difference(float((base.correct != tuned.correct).mean()), base.n)
    error = difference_error(base, tuned)
    if error is None:
        error = (interval[1] - interval[0]) / (2 * Z95)
    if base.is_fraction:  # agreement is not certain: as if one more example (or group) differed
        error = math.hypot(error, 1 / (base.n if base.groups is None else int(base.groups.max()) + 1))
    return smallest_difference(error, base.n, share=base.is_fraction)
