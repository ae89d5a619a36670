"""Scores of a language model on texts: loss, perplexity and token accuracy, from one small sum per example.

`summed` reads a batch's logits and lets them go; nothing larger than three numbers an example is kept, however large
the vocabulary and the set are. Intervals draw whole examples. It knows no tokenizer and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kitout.data.encode.item import IGNORE_INDEX
from kitout.errors import ConfigError
from kitout.evaluate.metrics.measure import Measure, from_sums, safe_divide

CHUNK_TOKENS = 1024  # tokens whose log-probabilities are held at once


@dataclass(frozen=True)
class LossSums:
    """One example, or one batch: the loss summed over its counted tokens, their number, and how many were foreseen."""

    loss: float
    num_tokens: int
    num_correct: int


@torch.no_grad()
def sum_losses(logits: Tensor, labels: Tensor) -> list[LossSums]:
    """One `Summed` per row. logits [B, T, V] and labels [B, T] in line: logits[:, t] foresees labels[:, t]."""
    flat, wanted = logits.flatten(0, 1), labels.flatten()
    counted = (wanted != IGNORE_INDEX).nonzero()[:, 0]
    losses = torch.zeros(len(wanted), device=logits.device)
    right = torch.zeros(len(wanted), dtype=torch.bool, device=logits.device)
    for places in counted.split(CHUNK_TOKENS):
        part = flat[places].float()
        losses[places] = F.cross_entropy(part, wanted[places], reduction="none")
        right[places] = part.argmax(dim=-1) == wanted[places]
    rows = zip(
        losses.view(labels.shape).double().sum(1).tolist(),
        (labels != IGNORE_INDEX).sum(1).tolist(),
        right.view(labels.shape).sum(1).tolist(),
        strict=True,
    )
    return [LossSums(loss, tokens, hits) for loss, tokens, hits in rows]


def language_metrics(examples: Sequence[LossSums]) -> dict[str, Measure]:
    """Loss in nats per token, over all tokens of all examples."""
    sums = np.array([[e.loss, e.num_correct, e.num_tokens] for e in examples], dtype=np.float64)
    if not sums[:, 2].sum():
        raise ConfigError(
            f"none of the {len(examples)} examples has a token that counts: every label is {IGNORE_INDEX}"
        )

    def loss(totals: NDArray[np.float64]) -> float:
        return safe_divide(totals[0], totals[2])

    return {
        "loss": from_sums(sums, loss, higher_is_better=False, is_fraction=False),
        "perplexity": from_sums(sums, lambda totals: _exp(loss(totals)), higher_is_better=False, is_fraction=False),
        "token_accuracy": from_sums(sums, lambda totals: safe_divide(totals[1], totals[2])),
    }


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # as large as a number gets
