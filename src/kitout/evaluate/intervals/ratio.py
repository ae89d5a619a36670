"""A ratio of two sums over examples, which is what most metrics are, and how far each example moves it.

A mean has denominators of 1, a loss per token the tokens, F1 the items of both sides. Sums over whole groups of
examples (questions about one passage) make a ratio again, so one formula serves examples and groups: standard errors
are of the linearized ratio, which for means is the textbook's, clustered by group. It knows no metric by name and no
resampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.float64]
Groups: TypeAlias = NDArray[np.intp]  # of each example: the number of its group, from 0


@dataclass(frozen=True, eq=False)
class Ratio:
    """shape(sum of numerators / sum of denominators) over n examples."""

    numerators: Values
    """[n]."""
    denominators: Values
    """[n]; all 1 for a mean."""
    shape: Literal["identity", "exp", "sqrt"] = "identity"
    """An increasing function of the quotient: perplexity is exp of the loss."""

    @property
    def quotient(self) -> float:
        """Before the shape; 0 without a denominator."""
        total = float(self.denominators.sum())
        return float(self.numerators.sum()) / total if total else 0.0

    @property
    def residuals(self) -> Values:
        """numerators - quotient * denominators; their sum is 0."""
        return self.numerators - self.quotient * self.denominators

    def apply(self, quotients: Values) -> Values:
        """The shape of quotients."""
        if self.shape == "exp":
            return np.asarray(np.exp(np.minimum(quotients, 700.0)))  # a float64 holds no more
        return np.asarray(np.sqrt(np.maximum(quotients, 0.0))) if self.shape == "sqrt" else quotients

    def slope(self, quotients: Values) -> Values:
        """The derivative of the shape."""
        if self.shape == "exp":
            return self.apply(quotients)
        if self.shape == "sqrt":
            roots = self.apply(quotients)
            return np.divide(0.5, roots, out=np.zeros_like(roots), where=roots > 0)
        return np.ones_like(quotients)

    def by_group(self, groups: Groups | None) -> Ratio:
        """The same ratio over sums of whole groups. groups: [n]; None: each example is its own."""
        if groups is None:
            return self
        n = int(groups.max()) + 1
        sums = np.zeros((2, n))
        for total, values in zip(sums, (self.numerators, self.denominators), strict=True):
            np.add.at(total, groups, values)
        return Ratio(sums[0], sums[1], self.shape)

    @np.errstate(over="ignore", invalid="ignore")  # of a loss that is not finite it is not finite either
    def influence(self) -> Values:
        """How far each example moves the value, linearized; their sum is 0."""
        total = float(self.denominators.sum())
        slope = self.slope(np.array([self.quotient]))
        return self.residuals * slope / total if total else np.zeros_like(self.numerators)


@np.errstate(over="ignore", invalid="ignore")
def standard_error(influence: Values) -> float:
    """Of a value, or of a difference of values, from what each example (or group) adds to it."""
    n = len(influence)
    return math.sqrt(float(influence @ influence) * n / max(1, n - 1))
