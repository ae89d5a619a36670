"""Scores by task: what was said against what is true, each figure with its 95 % interval.

`score` is what a training loop and a report call; `measures` gives the same before intervals, for comparing two
models on the same examples. The metrics themselves are in `labels`, `tags`, `numbers`, `texts` and `language`.
The first metric of a task is its headline. It knows no model and no file. Kept by hand: scikit-learn is too slow for a
thousand weighted resamplings of each figure, and seqeval has had no release since 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from kitout.errors import ConfigError, suggest
from kitout.evaluate.metrics.classification import classification_metrics, multilabel_metrics
from kitout.evaluate.metrics.entities import tag_metrics
from kitout.evaluate.metrics.generation import EXTRA_METRICS, generation_metrics
from kitout.evaluate.metrics.language import language_metrics
from kitout.evaluate.metrics.measure import Measure, Score
from kitout.evaluate.metrics.regression import regression_metrics

Task = Literal["classification", "regression", "multilabel", "tokens", "generation", "language"]
TASKS: tuple[str, ...] = get_args(Task)

TITLES = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy",
    "mae": "mean absolute error", "rmse": "root mean square error", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation", "micro_f1": "micro-F1", "exact_match": "exact match",
    "f1": "entity F1", "precision": "entity precision", "recall": "entity recall", "token_accuracy": "token accuracy",
    "token_f1": "token F1", "rouge_l": "ROUGE-L", "chrf": "chrF", "bleu": "BLEU",
    "loss": "loss", "perplexity": "perplexity",
}  # fmt: skip


def score(
    task: Task,
    predictions: Sequence[Any],
    references: Sequence[Any] = (),
    *,
    names: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    seed: int = 0,
    on_warning: Callable[[str], None] | None = None,
) -> dict[str, Score]:
    """Every metric of the task, or `only` these, with intervals.

    classification: labels (any values). regression: numbers. multilabel: 0/1 vectors. tokens: sequences of tags, or of
    classes with their `names`. generation: texts; where all are labels, say so by `names`, else that is found out.
    language: `Summed` values, no references. tell: hears what a missing optional package left out.
    """
    found = compute_measures(task, predictions, references, names=names, only=only, on_warning=on_warning)
    return {name: measure.score(seed) for name, measure in found.items()}


def compute_measures(
    task: Task,
    predictions: Sequence[Any],
    references: Sequence[Any] = (),
    *,
    names: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> dict[str, Measure]:
    """As `score`, before intervals are taken."""
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}: {suggest(str(task), TASKS)}")
    if not len(predictions):
        raise ConfigError(f"{task}: there are no predictions to score")
    if task != "language" and len(predictions) != len(references):
        raise ConfigError(f"{task}: {len(predictions)} predictions for {len(references)} references")
    if task == "language":
        found = language_metrics(predictions)
    elif task == "generation":
        found = generation_metrics(predictions, references, names, only, on_warning)
    elif task == "tokens":
        found = tag_metrics(_tag_names(predictions, names), _tag_names(references, names))
    else:
        makers = {
            "classification": classification_metrics,
            "regression": regression_metrics,
            "multilabel": multilabel_metrics,
        }
        found = makers[task](predictions, references)  # type: ignore[operator]
    return found if only is None else _select_metrics(task, found, only)


def _select_metrics(task: str, found_measures: dict[str, Measure], only: Sequence[str]) -> dict[str, Measure]:
    unknown = [name for name in only if name not in found_measures]
    if unknown:
        known = [*found_measures, *(EXTRA_METRICS if task == "generation" else ())]
        raise ConfigError(f"{task} has no metric {unknown[0]!r} here: {suggest(unknown[0], dict.fromkeys(known))}")
    return {name: found_measures[name] for name in only}


def _tag_names(rows: Sequence[Sequence[Any]], names: Sequence[str] | None) -> list[list[str]]:
    return [[str(tag) if names is None else names[tag] for tag in row] for row in rows]
