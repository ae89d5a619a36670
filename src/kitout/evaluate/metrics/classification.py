"""Scores of labels: one of a closed set for each example, or any number of them.

accuracy, macro-F1 and balanced accuracy; micro-F1, macro-F1 and exact match. F1 is 2 hits / (said + true), macro its
mean over the labels that occur, in truth or in answers, as scikit-learn has it. It knows no text and no model.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError, Faults
from kitout.evaluate.metrics.interval import Times
from kitout.evaluate.metrics.measure import Measure, count, mean_of, of_sums, ratio

SHOWN = 3  # faults told in full


def classify(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> dict[str, Measure]:
    """One label each; any values that can be told apart."""
    numbers: dict[Hashable, int] = {}
    true = np.array([numbers.setdefault(label, len(numbers)) for label in references], dtype=np.intp)
    said = np.array([numbers.setdefault(label, len(numbers)) for label in predictions], dtype=np.intp)
    return chosen(said, true, len(numbers))


def chosen(said: NDArray[np.intp], true: NDArray[np.intp], classes: int) -> dict[str, Measure]:
    """Numbers of classes; said may be -1, which is none of them and always wrong."""
    right = said == true
    known = said >= 0

    def total(labels: NDArray[np.intp], times: Times) -> NDArray[np.float64]:
        return np.asarray(np.bincount(labels, weights=times, minlength=classes), dtype=np.float64)

    def macro(times: Times) -> float:
        return _macro(total(true, times * right), total(said[known], times[known]), total(true, times))

    def balanced(times: Times) -> float:
        return mean_of(_over(total(true, times * right), total(true, times)))

    n = len(true)
    return {"accuracy": count(right), "macro_f1": Measure(macro, n), "balanced_accuracy": Measure(balanced, n)}


def multilabel(predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]) -> dict[str, Measure]:
    """A 0 or 1 for each label of each example."""
    said, true = _table("predictions", predictions), _table("references", references)
    if said.shape != true.shape:
        raise ConfigError(
            f"predictions have {said.shape[1]} labels an example, references {true.shape[1]}: give every example one "
            "0 or 1 for each label, in the same order"
        )
    sums = np.concatenate([said * true, said, true], axis=1)

    def micro(totals: NDArray[np.float64]) -> float:
        hits, saids, trues = np.split(totals, 3)
        return ratio(2 * hits.sum(), saids.sum() + trues.sum())

    return {
        "micro_f1": of_sums(sums, micro),
        "macro_f1": of_sums(sums, lambda totals: _macro(*np.split(totals, 3))),
        "exact_match": count((said == true).all(axis=1)),
    }


def _table(name: str, rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    faults = Faults(ConfigError, f"{name} of multilabel")
    width = len(rows[0])
    bad = [i for i, row in enumerate(rows) if len(row) != width or any(value not in (0, 1) for value in row)]
    for i in bad[:SHOWN]:
        faults.add(
            f"example {i} is {str(list(rows[i]))[:60]}, expected {width} values 0 or 1 (cut shares at 0.5 first)"
        )
    faults.raise_if_any()
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def _macro(hits: NDArray[np.float64], said: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    return mean_of(_over(2 * hits, said + true))


def _over(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """above / below, NaN where nothing is below."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
