"""How far a policy is from its reference, by token, and the controller that holds the distance at a target.

For tokens drawn from the policy: k1 = p - q is unbiased and may be negative, k3 = exp(q - p) - (q - p) - 1 is never
negative and varies less (http://joschu.net/blog/kl-approx.html). Log-probabilities are subtracted token by token in
float32 or more, and summed after: the difference of two long sums has lost its digits.
It knows log-probabilities of tokens, no distribution over a vocabulary and no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kitout.errors import ConfigError, TrainingDiverged
from kitout.train.objectives.chunked_cross_entropy import at_least_float32

LARGEST_CHANGE = 0.2  # of the coefficient, for a whole horizon in one update


def log_ratio(log_probs: Tensor, reference: Tensor) -> Tensor:
    """[N]: log_probs - reference of each token, in float32 or more; 0 where both are -inf (inf - inf is no number)."""
    log_probs, reference = at_least_float32(log_probs), at_least_float32(reference)
    is_impossible = log_probs.isneginf() & reference.isneginf()
    return log_probs.masked_fill(is_impossible, 0.0) - reference.masked_fill(is_impossible, 0.0)


def largest_exponent(dtype: torch.dtype) -> float:
    """Of which exp is finite with room to be multiplied: 80.7 in float32, 701.8 in float64."""
    return math.log(torch.finfo(dtype).max) - 8.0


def ratio(log_ratios: Tensor) -> Tensor:
    """exp, held below infinity: a clipped term's gradient would be 0 * inf, which is no number."""
    return log_ratios.clamp(max=largest_exponent(log_ratios.dtype)).exp()


def k1(log_probs: Tensor, reference: Tensor) -> Tensor:
    """[N]: log_probs - reference of each token, in nats; its mean over the policy's own tokens is the KL divergence."""
    return log_ratio(log_probs, reference.detach())


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """[N]: exp(d) - d - 1 of each token with d = reference - log_probs, in nats; exactly 0 where they are equal."""
    d = log_ratio(reference.detach(), log_probs)
    d = d.clamp(max=largest_exponent(d.dtype))
    return torch.expm1(d) - d


@dataclass(frozen=True)
class AdaptiveKL:
    """The coefficient of the KL penalty, moved so that the KL divergence comes to its target; state of a checkpoint.

    beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon (Ziegler et al. 2019, arXiv:1909.08593, section
    2.2; n / horizon as in their code). ConfigError if a value is not above 0.
    """

    beta: float = 0.05
    """The coefficient now."""
    target: float = 6.0
    """Nats per answer."""
    horizon: float = 10_000.0
    """Answers after which a KL divergence 20 % off its target has changed the coefficient by about 20 %."""

    def __post_init__(self) -> None:
        for name in ("beta", "target", "horizon"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} of the KL controller is {value}: write a number above 0")

    def update(self, kl: float, n: int) -> AdaptiveKL:
        """After n answers whose mean summed KL divergence is kl. TrainingDiverged if kl is not a number.

        n / horizon counts as at most 1: beyond 5 the coefficient would turn negative.
        """
        if math.isnan(kl):
            raise TrainingDiverged("the KL divergence between policy and reference is not a number")
        change = max(-LARGEST_CHANGE, min(LARGEST_CHANGE, kl / self.target - 1.0))
        return replace(self, beta=self.beta * (1.0 + change * min(n / self.horizon, 1.0)))
