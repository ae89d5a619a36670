"""Scores of labels: one of a closed set for each example, or any number of them.

accuracy, macro-F1 and balanced accuracy; micro-F1, macro-F1 and exact match. F1 is 2 hits / (said + true), macro its
mean over the labels that occur, in truth or in answers, as scikit-learn has it. It knows no text and no model.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError, Errors
from kitout.evaluate.metrics.interval import Weights
from kitout.evaluate.metrics.measure import Measure, from_sums, nan_mean, proportion, safe_divide

MAX_SHOWN_ERRORS = 3  # faults told in full


def classification_metrics(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> dict[str, Measure]:
    """One label each; any values that can be told apart."""
    numbers: dict[Hashable, int] = {}
    true = np.array([numbers.setdefault(label, len(numbers)) for label in references], dtype=np.intp)
    said = np.array([numbers.setdefault(label, len(numbers)) for label in predictions], dtype=np.intp)
    return class_metrics(said, true, len(numbers))


def class_metrics(predictions: NDArray[np.intp], references: NDArray[np.intp], num_classes: int) -> dict[str, Measure]:
    """Numbers of classes; said may be -1, which is none of them and always wrong."""
    right = predictions == references
    known = predictions >= 0

    def total(labels: NDArray[np.intp], weights: Weights) -> NDArray[np.float64]:
        return np.asarray(np.bincount(labels, weights=weights, minlength=num_classes), dtype=np.float64)

    def macro(weights: Weights) -> float:
        return _macro_f1(
            total(references, weights * right), total(predictions[known], weights[known]), total(references, weights)
        )

    def balanced(weights: Weights) -> float:
        return nan_mean(_divide(total(references, weights * right), total(references, weights)))

    n = len(references)
    return {"accuracy": proportion(right), "macro_f1": Measure(macro, n), "balanced_accuracy": Measure(balanced, n)}


def multilabel_metrics(
    predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
) -> dict[str, Measure]:
    """A 0 or 1 for each label of each example."""
    said, true = _check_multilabel("predictions", predictions), _check_multilabel("references", references)
    if said.shape != true.shape:
        raise ConfigError(
            f"predictions have {said.shape[1]} labels an example, references {true.shape[1]}: give every example one "
            "0 or 1 for each label, in the same order"
        )
    sums = np.concatenate([said * true, said, true], axis=1)

    def micro(totals: NDArray[np.float64]) -> float:
        hits, saids, trues = np.split(totals, 3)
        return safe_divide(2 * hits.sum(), saids.sum() + trues.sum())

    return {
        "micro_f1": from_sums(sums, micro),
        "macro_f1": from_sums(sums, lambda totals: _macro_f1(*np.split(totals, 3))),
        "exact_match": proportion((said == true).all(axis=1)),
    }


def _check_multilabel(name: str, rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    faults = Errors(ConfigError, f"{name} of multilabel")
    width = len(rows[0])
    bad = [i for i, row in enumerate(rows) if len(row) != width or any(value not in (0, 1) for value in row)]
    for i in bad[:MAX_SHOWN_ERRORS]:
        faults.add(
            f"example {i} is {str(list(rows[i]))[:60]}, expected {width} values 0 or 1 (cut shares at 0.5 first)"
        )
    faults.raise_if_any()
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def _macro_f1(hits: NDArray[np.float64], num_predicted: NDArray[np.float64], num_actual: NDArray[np.float64]) -> float:
    return nan_mean(_divide(2 * hits, num_predicted + num_actual))


def _divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """above / below, NaN where nothing is below."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
