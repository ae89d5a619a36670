"""Metrics of labels: one class per example, or any number of labels.

Of classes: accuracy, macro-F1, balanced accuracy and Matthews' correlation (of any number of classes, Gorodkin 2004).
Of several labels: micro-F1, macro-F1 and exact match. F1 is 2 hits / (predicted + actual); macro-F1 is its mean over
the labels that occur in the references or the predictions, as scikit-learn has it. It knows no text and no model.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError, Errors
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.intervals.resampled import Weights
from kitout.evaluate.metrics.measure import Measure, from_sums, nan_mean, proportion, safe_divide, safe_sqrt

MAX_SHOWN_ERRORS = 3  # reported one by one


def classification_metrics(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> dict[str, Measure]:
    """One label per example, of any values."""
    ids: dict[Hashable, int] = {}
    actual = np.array([ids.setdefault(label, len(ids)) for label in references], dtype=np.intp)
    predicted = np.array([ids.setdefault(label, len(ids)) for label in predictions], dtype=np.intp)
    return class_metrics(predicted, actual, len(ids))


def class_metrics(predictions: NDArray[np.intp], references: NDArray[np.intp], num_classes: int) -> dict[str, Measure]:
    """Class ids; a prediction of -1 is no class, and always incorrect."""
    correct = predictions == references
    has_class = predictions >= 0

    def total(labels: NDArray[np.intp], weights: Weights) -> NDArray[np.float64]:
        return np.asarray(np.bincount(labels, weights=weights, minlength=num_classes), dtype=np.float64)

    def macro(weights: Weights) -> float:
        return _macro_f1(
            total(references, weights * correct),
            total(predictions[has_class], weights[has_class]),
            total(references, weights),
        )

    def balanced(weights: Weights) -> float:
        return nan_mean(_divide(total(references, weights * correct), total(references, weights)))

    ones = np.ones(len(references))
    hits, num_actual = total(references, ones * correct), total(references, ones)
    num_both = num_actual + total(predictions[has_class], ones[has_class])

    def macro_influence() -> NDArray[np.float64]:
        """Of 2 hits / both, the mean over classes: an example is in the sums of its class and of the predicted one."""
        f1 = _zero_divide(2 * hits, num_both)
        moved = (2 * correct - f1[references]) / num_both[references]
        moved[has_class] -= _zero_divide(f1, num_both)[predictions[has_class]]
        return np.asarray(moved / np.count_nonzero(num_both))

    def balanced_influence() -> NDArray[np.float64]:
        recall = _zero_divide(hits, num_actual)
        moved = (correct - recall[references]) / num_actual[references]
        return np.asarray(moved / np.count_nonzero(num_actual))

    shifted = predictions + 1  # no class is one of its own, which no reference has

    def matthews(weights: Weights) -> float:
        predicted = np.bincount(shifted, weights=weights, minlength=num_classes + 1)
        actual, number = total(references, weights), weights.sum()
        covariance = number * (weights @ correct) - actual @ predicted[1:]
        spread = (number**2 - predicted @ predicted) * (number**2 - actual @ actual)
        return safe_divide(float(covariance), safe_sqrt(float(spread)))

    n = len(references)
    return {
        "accuracy": proportion(correct),
        "macro_f1": Measure(macro, n, influence_fn=macro_influence),
        "balanced_accuracy": Measure(balanced, n, influence_fn=balanced_influence),
        "mcc": Measure(matthews, n, is_fraction=False),
    }


def multilabel_metrics(
    predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
) -> dict[str, Measure]:
    """0 or 1 for each label of each example."""
    predicted, actual = _check_multilabel("predictions", predictions), _check_multilabel("references", references)
    if predicted.shape != actual.shape:
        raise ConfigError(
            f"predictions have {predicted.shape[1]} labels per example, references {actual.shape[1]}: every example "
            "needs a 0 or 1 for each label, in the same order"
        )
    sums = np.concatenate([predicted * actual, predicted, actual], axis=1)
    micro_ratio = Ratio(2 * (predicted * actual).sum(axis=1), (predicted + actual).sum(axis=1))

    def micro(totals: NDArray[np.float64]) -> float:
        hits, num_predicted, num_actual = np.split(totals, 3)
        return safe_divide(2 * hits.sum(), num_predicted.sum() + num_actual.sum())

    return {
        "micro_f1": from_sums(sums, micro, ratio=micro_ratio),
        "macro_f1": macro_f1_of_counts(predicted * actual, predicted, actual),
        "exact_match": proportion((predicted == actual).all(axis=1)),
    }


def macro_f1_of_counts(
    hits: NDArray[np.float64], predicted: NDArray[np.float64], actual: NDArray[np.float64]
) -> Measure:
    """Macro-F1 where an example has several labels or tags: its counts of each, [examples, labels]."""

    def influence() -> NDArray[np.float64]:
        both = (predicted + actual).sum(axis=0)
        f1 = _zero_divide(2 * hits.sum(axis=0), both)
        moved = _zero_divide(2 * hits - f1 * (predicted + actual), np.broadcast_to(both, predicted.shape))
        return np.asarray(moved.sum(axis=1) / max(1, np.count_nonzero(both)))

    sums = np.concatenate([hits, predicted, actual], axis=1)
    return replace(from_sums(sums, lambda totals: _macro_f1(*np.split(totals, 3))), influence_fn=influence)


def _check_multilabel(name: str, rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    errors = Errors(ConfigError, f"{name} of multilabel")
    width = len(rows[0])
    bad = [i for i, row in enumerate(rows) if len(row) != width or any(value not in (0, 1) for value in row)]
    for i in bad:
        shown = str(list(rows[i]))[:60]
        errors.add(f"example {i} is {shown}, expected {width} values 0 or 1 (threshold probabilities first, at 0.5)")
    errors.shorten(MAX_SHOWN_ERRORS, "examples")
    errors.raise_if_any()
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def _macro_f1(hits: NDArray[np.float64], num_predicted: NDArray[np.float64], num_actual: NDArray[np.float64]) -> float:
    return nan_mean(_divide(2 * hits, num_predicted + num_actual))


def _zero_divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """numerator / denominator; 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)


def _divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """numerator / denominator; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
