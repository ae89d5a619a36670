"""The mean of rewards as a metric: a share where every reward is 0 or 1, else a number in its own unit.

It knows numbers, and neither answers nor sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kitout.evaluate.metrics.measure import Measure, mean, proportion


def reward_measure(values: Sequence[float], is_share: bool | None = None) -> Measure:
    """Of one value or more. is_share: whether it is printed in percent; None: where all are 0 or 1."""
    array = np.array(values, dtype=np.float64)
    if is_share is None:
        is_share = set(array.tolist()) <= {0.0, 1.0}
    return proportion(array == 1.0) if is_share else mean(array, is_fraction=False)
