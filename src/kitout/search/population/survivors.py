"""Which candidates go on from a rung: the best ones, and those that do not differ from the last of these.

By the goal's metric over the validation split, or by the Pareto order where it is traded against something. A candidate
behind the last survivor stays if the two do not differ significantly (paired by example) and the examples that it will
be trained on are left in the budget. It knows scores, and no kit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kitout.evaluate.example_scores import ExampleScores
from kitout.evaluate.significance.paired import paired_p_value
from kitout.evaluate.significance.seeds import LEVEL

PROMOTED, TIED, DROPPED, DIVERGED, FORGETS = "promoted", "tied", "dropped", "diverged", "forgets"


@dataclass(frozen=True)
class Decision:
    """What became of one candidate at a rung. (The names are keys of decisions.json.)"""

    name: str
    """The candidate."""
    what: str
    """promoted, tied (which stays as well), dropped, diverged or forgets."""
    value: float
    """Of the goal's metric."""
    p_value: float | None = None
    """Against the last survivor; None: not compared."""
    forgetting: float | None = None
    """By how much the bits per byte of `wiki` have risen; None: not measured."""

    @property
    def stays(self) -> bool:
        """Whether it goes on."""
        return self.what in (PROMOTED, TIED)


@dataclass(frozen=True)
class Standing:
    """One candidate as a rung has measured it."""

    name: str
    """The candidate."""
    scores: ExampleScores
    """The goal's metric, by example."""
    loss: float
    """Decides between equal values."""
    costs: tuple[float, ...] = ()
    """What the metric is traded against, less is better; empty: the metric decides alone."""

    @property
    def value(self) -> float:
        """The goal's metric."""
        return self.scores.measure.value

    @property
    def merit(self) -> float:
        """The same, larger is better; not finite is worst."""
        value = self.value if self.scores.higher_is_better else -self.value
        return value if math.isfinite(value) else -math.inf


def decide(
    standings: Sequence[Standing], num_promoted: int, *, diverged: Mapping[str, str] | None = None,
    num_extra: int = 0, forgetting: Callable[[str], float] | None = None, max_forgetting: float | None = None,
) -> list[Decision]:  # fmt: skip
    """One decision for each, the best first.

    num_extra: how many more than num_promoted the budget holds. forgetting: measures a candidate that would stay.
    """
    gone = diverged or {}
    ordered = rank([one for one in standings if one.name not in gone])
    decisions, stayed, last, tried_all = [], 0, None, False
    for one in ordered:
        p_value = None
        if stayed >= num_promoted and last is not None:
            p_value = paired_p_value(last.scores.measure, one.scores.measure)
            if tried_all or p_value <= LEVEL or stayed >= num_promoted + num_extra:
                tried_all = tried_all or p_value <= LEVEL
                decisions.append(Decision(one.name, DROPPED, one.value, p_value))
                continue
        rise = None if forgetting is None else forgetting(one.name)
        if rise is not None and max_forgetting is not None and rise > max_forgetting:
            decisions.append(Decision(one.name, FORGETS, one.value, p_value, rise))
            continue
        is_promoted = stayed < num_promoted
        decisions.append(Decision(one.name, PROMOTED if is_promoted else TIED, one.value, p_value, rise))
        stayed += 1
        last = one if is_promoted else last
    return decisions + [Decision(one.name, DIVERGED, one.value) for one in standings if one.name in gone]


def rank(standings: Sequence[Standing]) -> list[Standing]:
    """The best first: by fronts of the Pareto order, within a front by the metric, then by loss and name."""
    fronts = pareto_fronts([(-one.merit, *one.costs) for one in standings])
    order = sorted(range(len(standings)), key=lambda i: (fronts[i], -standings[i].merit, _loss(standings[i]), i))
    return [standings[i] for i in order]


def _loss(standing: Standing) -> float:
    return standing.loss if math.isfinite(standing.loss) else math.inf


def pareto_fronts(points: Sequence[Sequence[float]]) -> list[int]:
    """Of each point the number of its front, 0 for those that no other is better than everywhere; less is better."""
    fronts, left, number = [-1] * len(points), set(range(len(points))), 0
    while left:
        front = {i for i in left if not any(_dominates(points[j], points[i]) for j in left)}
        for i in front:
            fronts[i] = number
        left -= front
        number += 1
    return fronts


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))
