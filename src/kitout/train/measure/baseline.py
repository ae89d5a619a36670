"""What a model with a newly initialized head is compared with: the best answer that reads no example.

Such a base answers by random weights, and to beat it shows nothing. Always giving the train split's majority class, its
median value or its most frequent tag is what a model has to beat; its loss is that of the train split's frequencies. It
knows datasets and metrics, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitout.evaluate.metrics.language import LossSums
from kitout.train.measure.predict import Predictions
from kitout.train.setup.job_datasets import Datasets

BASELINES = {  # by the task of the metrics: what is always given
    "classification": "majority class",
    "regression": "median value",
    "multilabel": "usual labels",
    "tokens": "usual tag",
}


def predict_constant(task: str, dataset: Datasets, examples: Sequence[Any]) -> Predictions:
    """The same answer to every example, by the train split (of a stream: its preview)."""
    train = [dataset.reference_of(item) for item in dataset.preview or dataset.train]
    references = [dataset.reference_of(item) for item in examples]
    if task == "regression":
        median = float(np.median(train))
        return Predictions([LossSums((median - v) ** 2, 1, 0) for v in references], [median] * len(references))
    num_classes = len(dataset.label_names)
    if task == "multilabel":
        shares = (np.sum(np.array(train, dtype=np.float64), axis=0) + 1) / (len(train) + 2)
        answer = [int(share > 0.5) for share in shares]
        losses = [
            LossSums(-float(np.mean(np.log(np.where(np.array(labels) > 0, shares, 1 - shares)))), 1, 0)
            for labels in references
        ]
        return Predictions(losses, [answer] * len(references))
    if task == "tokens":
        counts = _count([tag for tags in train for tag in tags], num_classes)
        answer_tag, costs = int(counts.argmax()), _costs(counts)
        sums = [LossSums(float(costs[tags].sum()), len(tags), tags.count(answer_tag)) for tags in references]
        return Predictions(sums, [[answer_tag] * len(tags) for tags in references])
    counts = _count(train, num_classes)
    majority, costs = int(counts.argmax()), _costs(counts)
    sums = [LossSums(float(costs[label]), 1, int(label == majority)) for label in references]
    return Predictions(sums, [majority] * len(references))


def _count(labels: Sequence[int], num_classes: int) -> NDArray[np.float64]:
    return np.bincount(np.array(labels, dtype=np.intp), minlength=num_classes).astype(np.float64)


def _costs(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cross-entropy in nats of each class; each counts once more, so that no class is impossible."""
    return np.asarray(-np.log((counts + 1) / (counts.sum() + len(counts))))
