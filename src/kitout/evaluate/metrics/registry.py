"""Metrics by task: predictions against references, each metric as a `Measure` that can give an interval.

The formulas are in the other files of this folder. The first metric of a task is its headline. It knows no model and no
file. The metrics are written by hand: scikit-learn is too slow for a thousand weighted resamplings of each, and seqeval
has had no release since 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from kitout.errors import ConfigError, suggest
from kitout.evaluate.metrics.calibration import calibration_error
from kitout.evaluate.metrics.choice_accuracy import choice_metrics, pair_metrics
from kitout.evaluate.metrics.classification import classification_metrics, multilabel_metrics
from kitout.evaluate.metrics.entities import tag_metrics
from kitout.evaluate.metrics.generation import EXTRA_METRICS, generation_metrics
from kitout.evaluate.metrics.language import language_metrics
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.metrics.regression import regression_metrics
from kitout.evaluate.metrics.texts import text_metrics

Task = Literal[
    "classification", "regression", "multilabel", "tokens", "generation", "language", "choice", "text", "pairs"
]
TASKS: tuple[str, ...] = get_args(Task)
SUMS: tuple[str, ...] = ("language", "text", "pairs")  # tasks whose predictions are sums or scores, without references

TITLES = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy",
    "mae": "mean absolute error", "rmse": "root mean square error", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation", "micro_f1": "micro-F1", "exact_match": "exact match",
    "f1": "entity F1", "precision": "entity precision", "recall": "entity recall", "token_accuracy": "token accuracy",
    "token_f1": "token F1", "rouge_l": "ROUGE-L", "chrf": "chrF", "bleu": "BLEU",
    "loss": "loss", "perplexity": "perplexity", "mcc": "Matthews correlation",
    "ece": "expected calibration error", "acc": "acc", "acc_norm": "acc_norm", "pair_accuracy": "pair accuracy",
    "bits_per_byte": "bits per byte", "auc": "AUC of desirable answers", "reward": "reward",
    "kl": "KL(base || tuned) per token",
}  # fmt: skip


def metric_title(name: str, note: str = "") -> str:
    """A metric's name for readers: "ROUGE-L (by character)"."""
    return TITLES.get(name, name) + (f" ({note})" if note else "")


def compute_measures(
    task: Task,
    predictions: Sequence[Any],
    references: Sequence[Any] = (),
    *,
    names: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    on_warning: Callable[[str], None] | None = None,
    confidences: Sequence[float] | None = None,
) -> dict[str, Measure]:
    """Every metric of the task, or `only` these; each gives its value and interval by `Measure.score`.

    classification: labels (any values). regression: numbers. multilabel: 0/1 vectors. tokens: sequences of tags, or of
    classes with their `names`. generation: texts; `names`: the labels, if all references are labels (otherwise that is
    detected). language: `LossSums`. text: `TextSums`. pairs: (score of the better, of the worse). These three have no
    references. choice: `ChoiceSums` and indices of the right choices. on_warning: is called for metrics whose optional
    package is missing. confidences: of classification, the probability of each prediction, for its calibration error.
    """
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}: {suggest(str(task), TASKS)}")
    if not len(predictions):
        raise ConfigError(f"{task}: there are no predictions to score")
    if task not in SUMS and len(predictions) != len(references):
        raise ConfigError(f"{task}: {len(predictions)} predictions for {len(references)} references")
    measures = _of_task(task, predictions, references, names, only, on_warning)
    if task == "classification" and confidences is not None:
        correct = np.array([p == r for p, r in zip(predictions, references, strict=True)])
        measures["ece"] = calibration_error(np.asarray(confidences, dtype=np.float64), correct)
    if only is None:
        return measures
    unknown = [name for name in only if name not in measures]
    if unknown:
        candidates = dict.fromkeys([*measures, *(EXTRA_METRICS if task == "generation" else ())])
        raise ConfigError(f"{task} has no metric {unknown[0]!r} here: {suggest(unknown[0], candidates)}")
    return {name: measures[name] for name in only}


def _of_task(
    task: Task,
    predictions: Sequence[Any],
    references: Sequence[Any],
    names: Sequence[str] | None,
    only: Sequence[str] | None,
    on_warning: Callable[[str], None] | None,
) -> dict[str, Measure]:
    if task == "generation":
        return generation_metrics(predictions, references, names, only, on_warning)
    if task == "tokens":
        return tag_metrics(_tag_names(predictions, names), _tag_names(references, names))
    of_sums: dict[str, Callable[[Any], dict[str, Measure]]] = {
        "language": language_metrics, "text": text_metrics, "pairs": pair_metrics
    }  # fmt: skip
    if task in of_sums:
        return of_sums[task](predictions)
    of_pairs: dict[str, Callable[[Any, Any], dict[str, Measure]]] = {
        "choice": choice_metrics, "regression": regression_metrics, "multilabel": multilabel_metrics,
        "classification": classification_metrics,
    }  # fmt: skip
    return of_pairs[task](predictions, references)


def _tag_names(rows: Sequence[Sequence[Any]], names: Sequence[str] | None) -> list[list[str]]:
    return [[str(tag) if names is None else names[tag] for tag in row] for row in rows]
