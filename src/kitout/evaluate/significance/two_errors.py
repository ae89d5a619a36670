"""A difference whose standard error has several parts, each with degrees of freedom of its own: interval and p-value.

The half-width of its interval is the root of the parts' squared half-widths (square-and-add: Zou and Donner 2008,
"Construction of confidence intervals about effect measures"). One part alone is Student's t; of two with known degrees
the test keeps its level at every mixture of them, also far out, where Satterthwaite's for both are too many (simulated
in tests/evaluate/significance). It knows numbers, and not what they are of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kitout.evaluate.intervals.distributions import root, t_p_value, t_quantile

LEAST_P = 1e-12  # below it a p-value is an upper bound

Errors = Sequence[tuple[float, float]]  # (standard error, degrees of freedom) of each part


def half_width(probability: float, errors: Errors) -> float:
    """Of the interval whose ends have this probability, at least 0.5, on one side."""
    return math.hypot(*(error * t_quantile(probability, degrees) for error, degrees in errors))


def p_value(difference: float, errors: Errors) -> float:
    """Two-sided: one minus the level of the interval that has 0 at its end."""
    parts = [(error, degrees) for error, degrees in errors if error]
    if not parts or not difference:
        return float(not difference)
    scale = math.hypot(*(error for error, _ in parts))
    t, parts = abs(difference) / scale, [(error / scale, degrees) for error, degrees in parts]
    most, least = (t_p_value(t, choose(degrees for _, degrees in parts)) for choose in (min, max))
    if most <= LEAST_P or least == most:
        return most
    least = max(least, LEAST_P)
    excess = lambda log_p: half_width(1 - math.exp(log_p) / 2, parts) - t  # noqa: E731
    if excess(math.log(least)) <= 0:
        return least
    return most if excess(math.log(most)) >= 0 else math.exp(root(excess, math.log(least), math.log(most)))
