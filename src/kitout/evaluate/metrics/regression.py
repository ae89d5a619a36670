"""Scores of numbers against numbers: errors in the unit of the data, and how well the order and the line agree.

A correlation with something constant is 0 here: it tells nothing apart. It knows no task and no model.
Spearman's is Pearson's over ranks, equal numbers sharing the mean of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError
from kitout.evaluate.metrics.interval import Times
from kitout.evaluate.metrics.measure import Measure, mean, of_sums, ratio, root


def regress(predictions: Sequence[float], references: Sequence[float]) -> dict[str, Measure]:
    """One number each."""
    said, true = _numbers("predictions", predictions), _numbers("references", references)
    off = said - true
    return {
        "mae": mean(np.abs(off), higher_is_better=False, share=False),
        "rmse": of_sums(
            np.stack([off**2, np.ones_like(off)], axis=1),
            lambda totals: root(ratio(totals[0], totals[1])),
            higher_is_better=False,
            share=False,
        ),
        "pearson": Measure(lambda times: _correlation(said, true, times), len(said), share=False),
        "spearman": _spearman(said, true),
    }


def _spearman(said: NDArray[np.float64], true: NDArray[np.float64]) -> Measure:
    places = [np.unique(values, return_inverse=True)[1] for values in (said, true)]

    def figure(times: Times) -> float:
        return _correlation(_ranks(places[0], times), _ranks(places[1], times), times)

    return Measure(figure, len(said), share=False)


def _ranks(places: NDArray[np.intp], times: Times) -> NDArray[np.float64]:
    """Rank of each example in the draw, from its place among the different values."""
    held = np.bincount(places, weights=times)
    return np.asarray((np.cumsum(held) - held + (held + 1) / 2)[places], dtype=np.float64)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64], times: Times) -> float:
    total = times.sum()
    a, b = a - times @ a / total, b - times @ b / total
    spread = root(float(times @ (a * a)) * float(times @ (b * b)))
    return max(-1.0, min(1.0, ratio(float(times @ (a * b)), spread)))


def _numbers(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(found)) if found.ndim == 1 else np.array([0])
    if len(bad):
        raise ConfigError(f"{name}: example {bad[0]} is {values[int(bad[0])]!r}, expected one finite number an example")
    return found
