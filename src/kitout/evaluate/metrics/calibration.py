"""Expected calibration error: how far a model's confidence is from how often it is right.

Predictions fall into bins of confidence of equal width, 15 from 0 to 1 by default; the error is the mean of
|share of correct - mean confidence| of the bins, by their number of examples (Naeini et al. 2015; Guo et al. 2017). It
knows numbers, and no labels and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError
from kitout.evaluate.intervals.resampled import wilson_interval
from kitout.evaluate.metrics.measure import Measure, from_sums

NUM_BINS = 15


@dataclass(frozen=True)
class CalibrationBin:
    """Predictions of like confidence. (The names are keys of results.json.)"""

    low: float
    """Above this confidence ..."""
    high: float
    """... up to this one."""
    n: int
    """Predictions in it."""
    confidence: float
    """Their mean confidence."""
    correct: float
    """The share of them that is right ..."""
    correct_low: float
    """... and its 95 % interval ..."""
    correct_high: float
    """... (Wilson's)."""


def calibration_bins(
    confidences: NDArray[np.float64], correct: NDArray[np.bool_], num_bins: int = NUM_BINS, lowest: float = 0.0
) -> list[CalibrationBin]:
    """The bins that hold a prediction. lowest: the least confidence there can be; of two choices 0.5."""
    values, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    edges, bins = np.linspace(lowest, 1, num_bins + 1), _bin_of(values, num_bins, lowest)
    found = []
    for k in np.unique(bins):
        inside = bins == k
        n, num_right = int(inside.sum()), float(right[inside].sum())
        interval = wilson_interval(num_right, n)
        found.append(CalibrationBin(
            float(edges[k]), float(edges[k + 1]), n, float(values[inside].mean()), num_right / n, *interval
        ))  # fmt: skip
    return found


def _bin_of(values: NDArray[np.float64], num_bins: int, lowest: float) -> NDArray[np.intp]:
    """The bins of np.linspace, whose upper ends are theirs; the first one has its lower end as well."""
    edges = np.linspace(lowest, 1, num_bins + 1)
    return np.clip(np.searchsorted(edges, values, side="left") - 1, 0, num_bins - 1)


def calibration_error(
    confidences: NDArray[np.float64], correct: NDArray[np.bool_], num_bins: int = NUM_BINS, lowest: float = 0.0
) -> Measure:
    """confidences: the probability of what was predicted, each from `lowest` to 1; correct: whether it was right."""
    values = np.asarray(confidences, dtype=np.float64)
    if len(values) != len(correct):
        raise ConfigError(f"{len(values)} confidences for {len(correct)} predictions")
    bad = np.flatnonzero(~((values >= 0) & (values <= 1 + 1e-6)))
    if len(bad):
        raise ConfigError(f"confidences: example {bad[0]} is {values[bad[0]]:g}, expected a probability from 0 to 1")
    in_bin = np.eye(num_bins)[_bin_of(values, num_bins, lowest)]
    gaps = (np.asarray(correct, dtype=np.float64) - values)[:, None] * in_bin  # [examples, bins]
    sums = np.concatenate([gaps, np.ones((len(values), 1))], axis=1)
    return from_sums(sums, lambda totals: np.abs(totals[:-1]).sum() / totals[-1], higher_is_better=False)
