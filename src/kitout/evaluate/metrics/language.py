"""Metrics of a language model on texts: loss, perplexity and token accuracy, from three sums per example.

Only these sums are kept, however large the vocabulary and the dataset are. Intervals resample whole examples. It knows
no logits, no tokenizer and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitout.data.encode.item import IGNORE_INDEX
from kitout.errors import ConfigError
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.metrics.measure import Measure, from_sums, safe_divide


@dataclass(frozen=True)
class LossSums:
    """Sums over the trained tokens of one example, or of one batch."""

    loss: float
    """Cross-entropy in nats."""
    num_tokens: int
    """How many tokens."""
    num_correct: int
    """How many of them were predicted."""


def language_metrics(examples: Sequence[LossSums]) -> dict[str, Measure]:
    """Loss in nats per token, over all tokens of all examples."""
    sums = np.array([[e.loss, e.num_correct, e.num_tokens] for e in examples], dtype=np.float64)
    if not sums[:, 2].sum():
        raise ConfigError(f"none of the {len(examples)} examples has a trained token: every label is {IGNORE_INDEX}")

    def loss(totals: NDArray[np.float64]) -> float:
        return safe_divide(totals[0], totals[2])

    return {
        "loss": from_sums(
            sums, loss, higher_is_better=False, is_fraction=False, ratio=Ratio(sums[:, 0], sums[:, 2])
        ),
        "perplexity": from_sums(
            sums, lambda totals: _exp(loss(totals)), higher_is_better=False, is_fraction=False,
            ratio=Ratio(sums[:, 0], sums[:, 2], "exp"),
        ),
        "token_accuracy": from_sums(
            sums, lambda totals: safe_divide(totals[1], totals[2]), ratio=Ratio(sums[:, 1], sums[:, 2])
        ),
    }  # fmt: skip


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # a float64 holds no more
