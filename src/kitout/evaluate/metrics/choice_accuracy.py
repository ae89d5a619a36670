"""Metrics of questions with choices, from the log-likelihood of each choice: how often the likeliest is the right one.

As lm-evaluation-harness has them: `acc` takes the largest sum, `acc_norm` the largest per character of the choice; the
first of equals wins. How sure a model is of its choice is the softmax of the sums, measured by its calibration error.
Pairs of a better and a worse answer have the share in which the better one scores higher. It knows no prompts and no
model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError, Errors
from kitout.evaluate.metrics.calibration import calibration_error
from kitout.evaluate.metrics.measure import Measure, proportion

MAX_SHOWN_ERRORS = 3  # reported one by one


@dataclass(frozen=True)
class ChoiceSums:
    """The choices of one question."""

    log_likelihoods: tuple[float, ...]
    """Summed over the tokens of each, in nats."""
    num_characters: tuple[int, ...]
    """Of each choice, as it was written."""

    @property
    def choice(self) -> int:
        """The likeliest; -1, which is never right, where a likelihood is no number."""
        return _largest(np.array(self.log_likelihoods, dtype=np.float64))

    @property
    def choice_by_length(self) -> int:
        """The likeliest per character; -1 where a likelihood is no number."""
        return _largest(np.array(self.log_likelihoods) / np.array(self.num_characters, dtype=np.float64))

    @property
    def confidence(self) -> float:
        """The probability of the likeliest among the choices; NaN where a likelihood is no number."""
        values = np.array(self.log_likelihoods, dtype=np.float64)
        with np.errstate(invalid="ignore"):  # all of them impossible
            return float(1.0 / np.exp(values - values.max()).sum())


def _largest(values: NDArray[np.float64]) -> int:
    return -1 if np.isnan(values).any() else int(np.argmax(values))


def choice_metrics(rows: Sequence[ChoiceSums], answers: Sequence[int]) -> dict[str, Measure]:
    """acc, acc_norm, and the calibration error of acc. answers: indices of the right choices."""
    errors = Errors(ConfigError, "answers of choices")
    bad = [i for i, (row, a) in enumerate(zip(rows, answers, strict=True)) if not 0 <= a < len(row.log_likelihoods)]
    for i in bad:
        errors.add(f"example {i} is {answers[i]}, expected an index from 0 to {len(rows[i].log_likelihoods) - 1}")
    errors.shorten(MAX_SHOWN_ERRORS, "examples")
    errors.raise_if_any()
    right = np.array(answers)
    correct = np.array([row.choice for row in rows]) == right
    confidences = np.array([row.confidence for row in rows])
    return {
        "acc": proportion(correct),
        "acc_norm": proportion(np.array([row.choice_by_length for row in rows]) == right),
        "ece": calibration_error(confidences, correct) if np.isfinite(confidences).all() else _not_finite(len(rows)),
    }


def _not_finite(n: int) -> Measure:
    """The calibration error of a model whose values are no numbers is none either; its accuracy is 0."""
    return Measure(lambda _weights: math.nan, n, higher_is_better=False)


def pair_metrics(pairs: Sequence[Sequence[float]]) -> dict[str, Measure]:
    """pair_accuracy: the share of (score of the better, score of the worse) in which the better is higher."""
    bad = [i for i, pair in enumerate(pairs) if len(pair) != 2 or not np.isfinite(np.asarray(pair, np.float64)).all()]
    if bad:
        raise ConfigError(f"pairs: example {bad[0]} is {pairs[bad[0]]!r}, expected two finite scores, the better first")
    scores = np.asarray(pairs, dtype=np.float64)
    return {"pair_accuracy": proportion(scores[:, 0] > scores[:, 1])}
