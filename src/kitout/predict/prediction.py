"""What a model says of one input: a class, several labels, a number, a tag for each word, or text.

One type for all tasks; what a task does not have is None. It knows logits and names, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One input's prediction."""

    label: str | None = None
    """The likeliest class, or the likeliest answer of a closed set."""
    probability: float | None = None
    """Of that label."""
    labels: tuple[str, ...] | None = None
    """Every label that applies, where several may (probability above one half)."""
    probabilities: Mapping[str, float] | None = None
    """By label, in the model's order; of labels that exclude each other they sum to 1."""
    value: float | None = None
    """The number, of a regression; the score of an answer, of a reward model."""
    chosen_score: float | None = None
    """Of a pair of answers, the score of the chosen one."""
    rejected_score: float | None = None
    """The score of the rejected one."""
    words: tuple[str, ...] | None = None
    """The words that were tagged."""
    tags: tuple[str | None, ...] | None = None
    """One per word; None for a word that the model did not see, because the text was too long or it has no token."""
    spans: tuple[Mapping[str, Any], ...] | None = None
    """The entities of a text as characters (start, end, label, text), where the training data had them so."""
    text: str | None = None
    """What the model wrote."""
    num_truncated: int = 0
    """Tokens of the input that the model did not see."""

    def to_dict(self) -> dict[str, Any]:
        """What this task has, as plain values."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value for name, value in named.items() if value is not None and name != "num_truncated"}
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return plain | ({"num_truncated": self.num_truncated} if self.num_truncated else {})

    def __str__(self) -> str:
        if self.label is not None:
            return f"{self.label} ({self.probability:.1%})"
        if self.labels is not None:
            return ", ".join(self.labels) or "none"
        if self.value is not None:
            return f"{self.value:.6g}"
        if self.chosen_score is not None:
            return f"chosen {self.chosen_score:.6g}, rejected {self.rejected_score:.6g}"
        if self.words is not None and self.tags is not None:
            pairs = zip(self.words, self.tags, strict=True)
            return " ".join(word if tag in ("O", None) else f"{word}/{tag}" for word, tag in pairs)
        return self.text or ""


def from_dict(values: Mapping[str, Any]) -> Prediction:
    """Of what `to_dict` gives."""
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Prediction(**fields)


def class_prediction(logits: Tensor, labels: Sequence[str], num_truncated: int = 0) -> Prediction:
    """logits [C] of labels that exclude each other."""
    shares = logits.double().softmax(0).tolist()
    best = int(logits.argmax())
    return Prediction(
        label=labels[best],
        probability=shares[best],
        probabilities=dict(zip(labels, shares, strict=True)),
        num_truncated=num_truncated,
    )


def labels_prediction(logits: Tensor, labels: Sequence[str], num_truncated: int = 0) -> Prediction:
    """logits [C] of labels that may apply together."""
    shares = dict(zip(labels, logits.double().sigmoid().tolist(), strict=True))
    applying = tuple(label for label, logit in zip(labels, logits.tolist(), strict=True) if logit > 0)
    return Prediction(labels=applying, probabilities=shares, num_truncated=num_truncated)


def value_prediction(logits: Tensor, _labels: Sequence[str], num_truncated: int = 0) -> Prediction:
    """logits [1]."""
    return Prediction(value=float(logits[0]), num_truncated=num_truncated)


def answers_prediction(logits: Tensor, _labels: Sequence[str], num_truncated: int = 0) -> Prediction:
    """logits [2] of a chosen and a rejected answer; nan in the place of the second where there is one answer."""
    first, second = map(float, logits)
    if math.isnan(second):
        return Prediction(value=first, num_truncated=num_truncated)
    return Prediction(chosen_score=first, rejected_score=second, num_truncated=num_truncated)


PREDICTIONS: dict[str, Callable[[Tensor, Sequence[str], int], Prediction]] = {
    "classification": class_prediction,
    "multilabel": labels_prediction,
    "regression": value_prediction,
    "pairs": answers_prediction,
}
"""By the task of the metrics: how a row of logits is read."""
