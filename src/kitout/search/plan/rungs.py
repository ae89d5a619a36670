"""Successive halving: how long each rung trains, how many candidates reach it, and what all of them cost.

16 candidates with factor 4 from 1/16 of a training: 16 to 1/16, 4 to 1/4, 1 to the end; 2.50 trainings in all
(Jamieson and Talwalkar 2016, arXiv 1502.07943). It knows numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """One step of the halving."""

    fraction: float
    """Of a whole training, at its end."""
    candidates: int
    """How many it is planned for."""


def plan_rungs(candidates: int, factor: int, first: float) -> list[Rung]:
    """The rungs; the last ends a whole training. At least one candidate reaches each."""
    rungs, fraction, number = [], first, float(candidates)
    while True:
        fraction = 1.0 if fraction > 1 - 1e-9 else fraction
        rungs.append(Rung(fraction, max(1, math.ceil(number - 1e-9))))
        if fraction == 1.0:
            return rungs
        fraction, number = fraction * factor, number / factor


def cost(rungs: Sequence[Rung]) -> float:
    """What all candidates are trained, in whole trainings."""
    before = [0.0, *(rung.fraction for rung in rungs)]
    return sum(rung.candidates * (rung.fraction - done) for rung, done in zip(rungs, before, strict=False))


def rung_steps(rungs: Sequence[Rung], num_steps: int) -> list[int]:
    """The optimizer step at which each rung ends: at least one more than the rung before."""
    ends: list[int] = []
    for number, rung in enumerate(rungs):
        latest = num_steps - (len(rungs) - 1 - number)
        ends.append(min(latest, max(round(rung.fraction * num_steps), ends[-1] + 1 if ends else 1)))
    return ends
