"""Metrics of texts under a language model: bits per byte, and how far the model's predictions moved from the base's.

Bits per byte, -sum log p / (ln 2 x bytes of UTF-8), compare models with different tokenizers. Only sums of each text
are kept; intervals resample whole texts. It knows no logits and no tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kitout.errors import ConfigError
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.metrics.measure import Measure, of_ratio


@dataclass(frozen=True)
class TextSums:
    """Sums over the tokens of one text."""

    nll: float
    """-sum log p, in nats."""
    num_tokens: int
    """How many tokens were scored."""
    num_bytes: int
    """Of the text in UTF-8."""
    divergence: float | None = None
    """sum KL(base || this model) over the same tokens, in nats; None where it was not asked for."""


def text_metrics(texts: Sequence[TextSums]) -> dict[str, Measure]:
    """bits_per_byte, then `kl`, in nats per token, where every text has its divergence."""
    sums = np.array([[t.nll, t.num_bytes, t.divergence or 0.0, t.num_tokens] for t in texts], dtype=np.float64)
    if not sums[:, 1].sum():
        raise ConfigError(f"all of the {len(texts)} texts are empty")
    ratios = {"bits_per_byte": Ratio(sums[:, 0], math.log(2) * sums[:, 1])}
    if all(text.divergence is not None for text in texts):
        ratios["kl"] = Ratio(sums[:, 2], sums[:, 3])
    return {name: of_ratio(one, higher_is_better=False, is_fraction=False) for name, one in ratios.items()}
