"""How far a tuned model's predictions are from the base's: KL(base || tuned) of each next token.

KL = sum_v p_base(v) (log p_base(v) - log p_tuned(v)), in nats, in float32 or finer, over a few positions at a time: no
copy of a batch's logits is made. It knows logits, and nothing of kits or texts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kitout.evaluate.ask.token_likelihood import ScoredLogits, at_least_float32, rows_per_chunk


def token_divergence(base: ScoredLogits, tuned: ScoredLogits) -> Tensor:
    """KL(base || tuned) where the same tokens are predicted, in the same order, [M]; exactly 0 for equal logits."""
    size = rows_per_chunk(base.logits.shape[1])
    positions = zip(base.positions.split(size), tuned.positions.split(size), strict=True)
    return torch.cat([logit_divergence(base.logits[b], tuned.logits[t]) for b, t in positions])


def logit_divergence(base_NV: Tensor, tuned_NV: Tensor) -> Tensor:
    """KL(base || tuned) of each row of logits, [N]."""
    log_base, log_tuned = (at_least_float32(logits).log_softmax(1) for logits in (base_NV, tuned_NV))
    terms = log_base.exp() * (log_base - log_tuned)
    terms.masked_fill_(log_base == -torch.inf, 0.0)  # what the base rules out adds nothing
    return terms.sum(1).clamp_min(0.0)  # rounding may leave less than nothing
