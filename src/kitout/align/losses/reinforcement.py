"""Losses of reinforcement: GRPO and its kin, RLOO, PPO's policy and value.

Inputs are flat over the answers' tokens [N] with their rows (`owners`, sorted), as `kitout.data.by_row` has them; each
returns every answer's loss [rows] with its gradient and a dict of metrics [rows] without. An answer counts as
`num_targets` targets: the loop divides the sum of the losses by the targets of the whole step, which gives each loss
its own normalization whatever the micro-batches.
It knows no rollout: old and reference log-probabilities, advantages, returns are given; no gradient goes to them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kitout.align.losses.divergence import k3, log_ratio, ratio
from kitout.align.losses.preference import ItemLosses
from kitout.data.by_row import count_by_row, mean_by_row, sum_by_row
from kitout.errors import ConfigError
from kitout.train.objectives.chunked_cross_entropy import at_least_float32

GroupLoss = Literal["grpo", "dapo", "dr_grpo"]


def num_targets(kind: GroupLoss | Literal["rloo", "ppo"], num_tokens: int, max_length: int) -> int:
    """What one answer counts as, where the loop divides the step's summed losses by the step's targets.

    num_tokens: of the answer. max_length: the most tokens an answer may have.
    grpo: 1 (the loss is a mean over the answer's tokens); dapo and ppo (policy and value): its tokens; dr_grpo:
    max_length; rloo: 1.
    """
    if kind in ("grpo", "rloo"):
        return 1
    return max_length if kind == "dr_grpo" else num_tokens


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    owners: Tensor,
    rows: int,
    kind: GroupLoss = "dapo",
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    reference: Tensor | None = None,
    beta: float = 0.0,
    correct_kl: bool = True,
    entropy: Tensor | None = None,
) -> ItemLosses:
    """Group-relative policy optimization, of each token -min(rho A, clip(rho, 1 - e, 1 + e_high) A) + beta k3.

    log_probs, old_log_probs: [N], of the policy now and of the policy that wrote the answers; rho = exp(now - old).
    advantages: [rows], `group_advantages`. kind: "grpo", the mean over the answer's tokens (Shao et al. 2024,
    arXiv:2402.03300, eq. 3); "dapo" (Yu et al. 2025, arXiv:2503.14476, eq. 8) and "dr_grpo" (Liu et al. 2025,
    arXiv:2503.20783), their sum: see `num_targets`. clip, clip_high: e and e_high; None: as clip. reference: [N],
    needed where beta is not 0. correct_kl: k3 times rho, as in TRL: unbiased after the policy has moved. entropy: [N],
    for the metrics. Metrics: ratio, clip_fraction and entropy, means over tokens; kl, the sum of the k3 that enter the
    loss, in nats per answer. ConfigError on settings out of range.
    """
    if kind not in ("grpo", "dapo", "dr_grpo"):
        raise ConfigError(f"no loss of groups is called {kind!r}: write grpo, dapo or dr_grpo")
    if beta and reference is None:
        raise ConfigError(f"beta={beta} weighs the KL divergence from a reference: give its log-probabilities")
    terms, rho, is_clipped = _clipped_terms(
        log_ratio(log_probs, old_log_probs.detach()), advantages[owners], clip, clip_high
    )
    metrics = _token_means(owners, rows, ratio=rho, clip_fraction=is_clipped, entropy=entropy)
    if reference is not None:
        kl = k3(log_probs, reference)
        if correct_kl:
            kl = kl * rho
        metrics["kl"] = sum_by_row(kl.detach(), owners, rows)
        if beta:
            terms = terms + beta * kl
    return (mean_by_row if kind == "grpo" else sum_by_row)(terms, owners, rows), metrics


def rloo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    owners: Tensor,
    rows: int,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    entropy: Tensor | None = None,
) -> ItemLosses:
    """REINFORCE leave-one-out, -min(rho A, clip(rho) A) with the ratio of the whole answer, rho = exp(sum(now - old)).

    As `grpo_loss`, with advantages [rows] from `rloo_advantages` (Ahmadian et al. 2024, arXiv:2402.14740; ratio and
    clip as in TRL). The KL penalty is part of the reward. Metrics: ratio, clip_fraction, entropy.
    """
    sequence_log_ratios = sum_by_row(log_ratio(log_probs, old_log_probs.detach()), owners, rows)
    losses, rho, is_clipped = _clipped_terms(sequence_log_ratios, advantages, clip, clip_high)
    metrics = {"ratio": rho.detach(), "clip_fraction": is_clipped}
    return losses, metrics | _token_means(owners, rows, entropy=entropy)


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    owners: Tensor,
    rows: int,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    entropy: Tensor | None = None,
) -> ItemLosses:
    """Proximal policy optimization, the sum over tokens of max(-A rho, -A clip(rho, 1 - e, 1 + e)).

    As `grpo_loss`, with an advantage of each token, [N], from `gae`, whitened over the batch (Schulman et al. 2017,
    arXiv:1707.06347, eq. 7). Metrics: ratio, clip_fraction, entropy, means over tokens.
    """
    terms, rho, is_clipped = _clipped_terms(log_ratio(log_probs, old_log_probs.detach()), advantages, clip, clip_high)
    metrics = _token_means(owners, rows, ratio=rho, clip_fraction=is_clipped, entropy=entropy)
    return sum_by_row(terms, owners, rows), metrics


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, owners: Tensor, rows: int, *, clip: float = 0.2
) -> ItemLosses:
    """The sum over tokens of 0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2); weigh it by 0.1 as usual.

    values, old_values: [N], of the state before each token, now and at the rollout. returns: [N], `gae`. clip: c, in
    units of the reward. Metrics: value_clip_fraction (tokens where the clipped error is the larger) and value, means
    over tokens.
    """
    _check_clip(clip)
    values = at_least_float32(values)
    old_values, returns = at_least_float32(old_values.detach()), at_least_float32(returns.detach())
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    errors, clipped_errors = (values - returns).square(), (clipped - returns).square()
    is_clipped = (clipped_errors > errors).to(errors.dtype)
    losses = sum_by_row(0.5 * torch.maximum(errors, clipped_errors), owners, rows)
    return losses, _token_means(owners, rows, value_clip_fraction=is_clipped, value=values)


def _clipped_terms(
    log_ratios: Tensor, advantages: Tensor, clip: float, clip_high: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-min(rho A, clip(rho) A), rho, and 1.0 where the clip took the gradient away."""
    low, high = 1.0 - clip, 1.0 + (clip if clip_high is None else clip_high)
    _check_clip(clip, high - 1.0)
    advantages = advantages.detach().to(log_ratios.dtype)
    rho = ratio(log_ratios)
    terms = -torch.min(rho * advantages, rho.clamp(low, high) * advantages)
    is_clipped = ((rho < low) & (advantages < 0)) | ((rho > high) & (advantages > 0))
    return terms, rho, is_clipped.to(rho.dtype)


def _token_means(owners: Tensor, rows: int, **values: Tensor | None) -> dict[str, Tensor]:
    """[rows] each, of values [N] that are given; nan for an answer without tokens."""
    is_empty = count_by_row(owners, rows) == 0
    return {
        name: mean_by_row(each.detach(), owners, rows).masked_fill(is_empty, math.nan)
        for name, each in values.items()
        if each is not None
    }


def _check_clip(*clips: float) -> None:
    for clip in clips:
        if not 0 < clip < math.inf:
            raise ConfigError(f"the clip range is {clip}: write a number above 0, 0.2 as usual")
