"""What an adapter made the model forget: set by set the change from the base, and one word for each.

lost or gained: the change is significant after Holm's correction over the sets of one adapter. kept: its interval lies
within a margin of no change (2 points of accuracy, on at least 189 questions; 0.02 bits per byte). Anything else is not
distinguishable: the set is too small to say. Values that are not finite are called that. It knows scores, and neither
sets nor models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kitout.evaluate.compare import MetricChange
from kitout.evaluate.intervals.resampled import agreement_reach
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.significance.many import holm
from kitout.evaluate.significance.paired import paired_p_value
from kitout.evaluate.significance.seeds import LEVEL
from kitout.format import align_columns, format_number

SHARE_MARGIN, BITS_MARGIN = 0.02, 0.02
NOT_FINITE = "not finite"
SMALLEST = "smallest shown"  # the smallest difference that the set shows with a power of 80 %


@dataclass(frozen=True)
class SetChange:
    """One set. (The names are keys of results.json.)"""

    name: str
    """The set."""
    change: MetricChange
    """Its headline metric, of the base and with the adapter."""
    p_value: float
    """Of this set alone, paired by example, two-sided."""
    adjusted: float
    """The same after Holm's correction over the sets."""
    divergence: float | None = None
    """KL(base || adapter) in nats per token, of texts."""

    @property
    def verdict(self) -> str:
        """lost, gained, kept, not distinguishable or not finite."""
        if not math.isfinite(self.change.difference):
            return NOT_FINITE
        margin = SHARE_MARGIN if self.change.base.share else BITS_MARGIN
        if self.adjusted <= LEVEL and self.change.difference:
            return "gained" if (self.change.difference > 0) == self.change.base.higher_is_better else "lost"
        is_within = -margin <= self.change.low and self.change.high <= margin
        if self.change.base.share:  # what may change of so small a set on which nothing did
            is_within = is_within and agreement_reach(self.change.base.num_groups or self.change.base.n) <= margin
        return "kept" if is_within else "not distinguishable"


def set_changes(
    base: Mapping[str, Mapping[str, Measure]],
    tuned: Mapping[str, Mapping[str, Measure]],
    changes: Mapping[str, Sequence[MetricChange]],
) -> tuple[SetChange, ...]:
    """By set: measures of the base and of one adapter over the same examples, and their comparison."""
    headlines = {name: changes[name][0] for name in tuned}
    p_values = [paired_p_value(base[name][one.name], tuned[name][one.name]) for name, one in headlines.items()]
    return tuple(
        SetChange(name, change, p, adjusted, tuned[name]["kl"].value if "kl" in tuned[name] else None)
        for (name, change), p, adjusted in zip(headlines.items(), p_values, holm(p_values), strict=True)
    )


def forgetting_line(changes: Sequence[SetChange]) -> str:
    """lost on piqa; kept on wiki; not distinguishable on obqa, csqa"""
    words = ("lost", NOT_FINITE, "gained", "kept", "not distinguishable")
    by_word = {word: [one.name for one in changes if one.verdict == word] for word in words}
    return "; ".join(f"{word} on {', '.join(names)}" for word, names in by_word.items() if names)


def forgetting_to_dict(changes: Sequence[SetChange]) -> dict[str, Any]:
    """Plain values, as results.json has them."""
    return {
        "summary": forgetting_line(changes),
        "sets": {
            one.name: {
                "metric": one.change.name,
                "base": one.change.base.value,
                "difference": one.change.difference,
                "low": one.change.low,
                "high": one.change.high,
                "smallest": None if one.change.smallest is None else one.change.smallest.value,
                "n": one.change.base.n,
                "p_value": one.p_value,
                "adjusted": one.adjusted,
                "kl": one.divergence,
                "verdict": one.verdict,
            }
            for one in changes
        },
    }


def forgetting_rows(changes: Sequence[SetChange]) -> list[tuple[str, ...]]:
    """A table, its head first."""
    head = ("set", "metric", "base", "adapter", "change (95 %)", SMALLEST, "p (Holm)", "KL", "verdict")
    rows: list[tuple[str, ...]] = [head]
    for one in changes:
        change, kl = one.change, "" if one.divergence is None else format_number(one.divergence)
        interval = f"{change.format_value(change.low, True)} to {change.format_value(change.high, True)}"
        rows.append(
            (
                f"{one.name} ({change.base.n:,})",
                change.title,
                change.format_value(change.base.value),
                change.format_value(change.tuned.value),
                f"{change.format_value(change.difference, True)} ({interval})",
                "" if change.smallest is None else change.smallest.amount.removesuffix(" points"),
                f"{one.adjusted:.2g}",
                kl,
                one.verdict,
            )
        )
    return rows


def forgetting_table(changes: Sequence[SetChange]) -> str:
    """The same as aligned lines, with one line that says it in words."""
    return "\n".join([*align_columns(forgetting_rows(changes)), forgetting_line(changes)])
