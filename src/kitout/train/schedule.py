"""The learning rate over a run: a linear rise, then a half cosine down to zero.

A share of the full rate by step, so that it depends on nothing but how far the run is, and a resumed run goes on
exactly where it stopped. It knows no optimiser.
"""

from __future__ import annotations

import math


def rise_and_fall(step: int, steps: int, warmup: float) -> float:
    """The share of the full rate at `step` of `steps`; warmup: the part of the run that rises."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))
