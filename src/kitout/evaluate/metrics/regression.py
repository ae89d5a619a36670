"""Metrics of predicted numbers: errors in the unit of the data, and correlations.

Spearman's correlation is Pearson's over ranks; equal numbers share their mean rank. A correlation with a constant is 0.
It knows no task and no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.intervals.resampled import Weights
from kitout.evaluate.metrics.measure import Measure, from_sums, mean, safe_divide, safe_sqrt


def regression_metrics(predictions: Sequence[float], references: Sequence[float]) -> dict[str, Measure]:
    """One number per example."""
    predicted, actual = _check_numbers("predictions", predictions), _check_numbers("references", references)
    errors = predicted - actual
    return {
        "mae": mean(np.abs(errors), higher_is_better=False, is_fraction=False),
        "rmse": from_sums(
            np.stack([errors**2, np.ones_like(errors)], axis=1),
            lambda totals: safe_sqrt(safe_divide(totals[0], totals[1])),
            higher_is_better=False,
            is_fraction=False,
            ratio=Ratio(errors**2, np.ones_like(errors), "sqrt"),
        ),
        "pearson": Measure(lambda weights: _correlation(predicted, actual, weights), len(predicted), is_fraction=False),
        "spearman": _spearman(predicted, actual),
    }


def _spearman(predictions: NDArray[np.float64], references: NDArray[np.float64]) -> Measure:
    value_ids = [np.unique(values, return_inverse=True)[1] for values in (predictions, references)]

    def rank_correlation(weights: Weights) -> float:
        return _correlation(_ranks(value_ids[0], weights), _ranks(value_ids[1], weights), weights)

    return Measure(rank_correlation, len(predictions), is_fraction=False)


def _ranks(value_ids: NDArray[np.intp], weights: Weights) -> NDArray[np.float64]:
    """Rank of each example in a resample, from the index of its value among the sorted distinct values."""
    counts = np.bincount(value_ids, weights=weights)
    return np.asarray((np.cumsum(counts) - counts + (counts + 1) / 2)[value_ids], dtype=np.float64)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64], weights: Weights) -> float:
    total = weights.sum()
    a, b = a - weights @ a / total, b - weights @ b / total
    spread = safe_sqrt(float(weights @ (a * a)) * float(weights @ (b * b)))
    return max(-1.0, min(1.0, safe_divide(float(weights @ (a * b)), spread)))


def _check_numbers(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers)) if numbers.ndim == 1 else np.array([0])
    if len(bad):
        raise ConfigError(
            f"{name}: example {bad[0]} is {values[int(bad[0])]!r}, expected one finite number per example"
        )
    return numbers
