"""Scores of numbers against numbers: errors in the unit of the data, and how well the order and the line agree.

A correlation with something constant is 0 here: it tells nothing apart. It knows no task and no model.
Spearman's is Pearson's over ranks, equal numbers sharing the mean of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError
from kitout.evaluate.metrics.interval import Weights
from kitout.evaluate.metrics.measure import Measure, from_sums, mean, safe_divide, safe_sqrt


def regression_metrics(predictions: Sequence[float], references: Sequence[float]) -> dict[str, Measure]:
    """One number each."""
    said, true = _check_numbers("predictions", predictions), _check_numbers("references", references)
    off = said - true
    return {
        "mae": mean(np.abs(off), higher_is_better=False, is_fraction=False),
        "rmse": from_sums(
            np.stack([off**2, np.ones_like(off)], axis=1),
            lambda totals: safe_sqrt(safe_divide(totals[0], totals[1])),
            higher_is_better=False,
            is_fraction=False,
        ),
        "pearson": Measure(lambda times: _correlation(said, true, times), len(said), is_fraction=False),
        "spearman": _spearman(said, true),
    }


def _spearman(predictions: NDArray[np.float64], references: NDArray[np.float64]) -> Measure:
    places = [np.unique(values, return_inverse=True)[1] for values in (predictions, references)]

    def figure(weights: Weights) -> float:
        return _correlation(_ranks(places[0], weights), _ranks(places[1], weights), weights)

    return Measure(figure, len(predictions), is_fraction=False)


def _ranks(value_ids: NDArray[np.intp], weights: Weights) -> NDArray[np.float64]:
    """Rank of each example in the draw, from its place among the different values."""
    held = np.bincount(value_ids, weights=weights)
    return np.asarray((np.cumsum(held) - held + (held + 1) / 2)[value_ids], dtype=np.float64)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64], weights: Weights) -> float:
    total = weights.sum()
    a, b = a - weights @ a / total, b - weights @ b / total
    spread = safe_sqrt(float(weights @ (a * a)) * float(weights @ (b * b)))
    return max(-1.0, min(1.0, safe_divide(float(weights @ (a * b)), spread)))


def _check_numbers(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(found)) if found.ndim == 1 else np.array([0])
    if len(bad):
        raise ConfigError(f"{name}: example {bad[0]} is {values[int(bad[0])]!r}, expected one finite number an example")
    return found
