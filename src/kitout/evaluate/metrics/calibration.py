"""Expected calibration error: how far a model's confidence is from how often it is right.

Predictions fall into 15 bins of confidence of equal width, (0, 1/15] to (14/15, 1]; the error is the mean of
|share of correct - mean confidence| of the bins, by their number of examples (Naeini et al. 2015; Guo et al. 2017). It
knows numbers, and no labels and no model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError
from kitout.evaluate.metrics.measure import Measure, from_sums

NUM_BINS = 15


def calibration_error(confidences: NDArray[np.float64], correct: NDArray[np.bool_]) -> Measure:
    """confidences: the probability of what was predicted, each in [0, 1]; correct: whether it was right."""
    values = np.asarray(confidences, dtype=np.float64)
    if len(values) != len(correct):
        raise ConfigError(f"{len(values)} confidences for {len(correct)} predictions")
    bad = np.flatnonzero(~((values >= 0) & (values <= 1 + 1e-6)))
    if len(bad):
        raise ConfigError(f"confidences: example {bad[0]} is {values[bad[0]]:g}, expected a probability from 0 to 1")
    # the bins of np.linspace, whose upper ends are theirs
    bins = np.clip(np.searchsorted(np.linspace(0, 1, NUM_BINS + 1), values, side="left") - 1, 0, NUM_BINS - 1)
    in_bin = np.eye(NUM_BINS)[bins]
    gaps = (np.asarray(correct, dtype=np.float64) - values)[:, None] * in_bin  # [examples, bins]
    sums = np.concatenate([gaps, np.ones((len(values), 1))], axis=1)
    return from_sums(sums, lambda totals: np.abs(totals[:-1]).sum() / totals[-1], higher_is_better=False)
