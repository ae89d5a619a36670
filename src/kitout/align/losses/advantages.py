"""From the scores of answers to the advantages of answers and tokens: groups, leave-one-out, GAE, whitening.

In a tensor of scores NaN is "no score" (a reward function returned None): such an answer leaves its group's mean and
gets advantage 0. All of it is without gradient, and over the whole batch of a rollout, before micro-batches are cut.
It knows scores, values and log-probabilities of tokens, and neither where a score comes from nor a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kitout.align.losses.divergence import k1
from kitout.data.by_row import count_by_row, last_by_row
from kitout.errors import ConfigError

Scale = Literal["group", "batch", "none"]
MIN_SPREAD = 1e-4  # added to a standard deviation, as TRL does
MIN_VARIANCE = 1e-8  # added to a variance when whitening, as TRL did


def score_tensor(scores: Sequence[float | None], device: torch.device | str = "cpu") -> Tensor:
    """[rows] of float64; NaN where a score is None. ConfigError names the first score that is not a finite number."""
    for row, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            raise ConfigError(f"the reward of answer {row} is {score}: return a finite number, or None for no score")
    return torch.tensor([math.nan if s is None else float(s) for s in scores], dtype=torch.float64, device=device)


@torch.no_grad()
def group_advantages(scores: Tensor, group_size: int, scale: Scale = "group") -> Tensor:
    """[rows]: (score - mean of the group) / (standard deviation + 1e-4), 0 without a score (arXiv:2402.03300, 4.1.2).

    scores: [rows], the answers of each prompt one after the other, group_size of them. scale: the standard deviation
    (over n - 1) of the answer's "group" or of the whole "batch", or "none", as in Dr. GRPO (arXiv:2503.20783). Exactly
    0 in groups without spread or with one score. ConfigError if group_size is 1.
    """
    if scale not in ("group", "batch", "none"):
        raise ConfigError(f"rewards are not scaled by {scale!r}: write group, batch or none")
    groups = _groups(scores, group_size)
    advantages = groups - groups.nanmean(1, keepdim=True)
    if scale != "none":
        spread = _nanstd(groups, 1) if scale == "group" else _nanstd(groups.reshape(1, -1), 1)
        advantages = advantages / (spread + MIN_SPREAD)
    return torch.where(has_spread(scores, group_size)[:, None], advantages, 0.0).nan_to_num(nan=0.0).reshape(-1)


@torch.no_grad()
def rloo_advantages(
    scores: Tensor, group_size: int, *, kl: Tensor | None = None, beta: float = 0.05, normalize: bool = False
) -> Tensor:
    """[rows]: R' - mean of R' over the group's other answers, R' = score - beta * kl (arXiv:2402.14740).

    scores, group_size: as `group_advantages`. kl: [rows], the sum of k1 over the answer's tokens; None: no penalty.
    normalize: over all scored answers, mean 0 and standard deviation 1. 0 without a score, and where no other answer
    of the group has one.
    """
    groups = _groups(scores if kl is None else scores - beta * kl.to(scores), group_size)
    others = (~groups.isnan()).sum(1, keepdim=True) - 1
    advantages = groups - (groups.nansum(1, keepdim=True) - groups) / others
    advantages = advantages.masked_fill(others < 1, math.nan)
    if normalize:
        flat = advantages.reshape(1, -1)
        advantages = (advantages - flat.nanmean()) / (_nanstd(flat, 1) + MIN_SPREAD)
    return advantages.nan_to_num(nan=0.0).reshape(-1)


def has_spread(scores: Tensor, group_size: int) -> Tensor:
    """[groups] of bool: whether two answers of the group have different scores; without, a group teaches nothing."""
    groups = _groups(scores, group_size)
    largest, smallest = groups.nan_to_num(nan=-math.inf).amax(1), groups.nan_to_num(nan=math.inf).amin(1)
    return largest > smallest


@torch.no_grad()
def scores_without_end(scores: Tensor, has_end: Tensor, *, penalty: float = 0.0, fixed: float | None = None) -> Tensor:
    """[rows]: answers that were cut before their end token get a fixed low score, or else this much less.

    has_end: [rows] of bool. An answer without a score stays without one (arXiv:2403.17031).
    """
    lower = scores - penalty if fixed is None else torch.full_like(scores, fixed)
    return torch.where(has_end | scores.isnan(), scores, lower)


def score_shift(scores: Tensor) -> float:
    """What is added to every score so that these, of the starting policy's own answers, have mean 0; 0.0 of none."""
    mean = scores.double().nanmean().item()
    return 0.0 if math.isnan(mean) else -mean


@torch.no_grad()
def token_rewards(
    scores: Tensor, log_probs: Tensor, reference: Tensor, owners: Tensor, rows: int, *, beta: float = 0.05
) -> Tensor:
    """[N]: -beta * (log_probs - reference) of every token, and the answer's score added at its last (PPO).

    scores: [rows]; ConfigError if one is missing: leave such an answer out of the batch. log_probs: [N], of the policy
    that wrote the answers. owners: [N], sorted.
    """
    if bool(scores.isnan().any()):
        raise ConfigError("an answer without a score has no return: leave it out of the batch")
    rewards = -beta * k1(log_probs, reference)
    last = last_by_row(_sorted(owners), rows)
    has_tokens = last >= 0
    return rewards.index_add(0, last[has_tokens], scores[has_tokens].to(rewards))


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, owners: Tensor, rows: int, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16): advantages and returns, [N].

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, both 0 after the answer's last token;
    returns = A + V, before any whitening. rewards, values: [N]; values of the state **before** each token. owners:
    [N], sorted.
    """
    counts = count_by_row(_sorted(owners), rows)
    starts = counts.cumsum(0) - counts
    columns = torch.arange(len(owners), device=owners.device) - starts[owners]
    width = int(counts.max()) if len(owners) else 0
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards_BT, values_BT = torch.zeros(2, rows, width + 1, dtype=dtype, device=values.device).unbind(0)
    rewards_BT[owners, columns] = rewards.to(dtype)
    values_BT[owners, columns] = values.to(dtype)
    advantages_BT = torch.zeros_like(values_BT)
    for t in reversed(range(width)):  # what lies behind a row's end is 0 throughout, and stays so
        delta = rewards_BT[:, t] + gamma * values_BT[:, t + 1] - values_BT[:, t]
        advantages_BT[:, t] = delta + gamma * lam * advantages_BT[:, t + 1]
    advantages = advantages_BT[owners, columns]
    return advantages, advantages + values.to(dtype)


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """[N]: mean 0 (shift_mean) and variance 1 over the values in the mask; the others become 0.

    values: [N], of the whole batch. mask: [N] of bool; None: all. Variance over n - 1, 1e-8 added; of one value: 0.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    count = mask.sum()
    mean = values.masked_fill(~mask, 0.0).sum() / count.clamp(min=1)
    centered = (values - mean).masked_fill(~mask, 0.0)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    whitened = centered * torch.rsqrt(variance + MIN_VARIANCE)
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(returns - values) / var(returns) of a batch's tokens: 1 perfect, 0 as a constant, NaN undefined."""
    values, returns = values.double(), returns.double()
    total = returns.var(correction=0).item() if len(returns) else 0.0
    return 1.0 - (returns - values).var(correction=0).item() / total if total > 0 else math.nan


def _groups(scores: Tensor, group_size: int) -> Tensor:
    """[groups, group_size]."""
    if group_size < 2:
        raise ConfigError(
            f"n={group_size}: an answer is compared with the others to its prompt; write n=2 or more (grpo: 8, rloo: 2 "
            "to 4), or take ppo, which compares with a value"
        )
    if len(scores) % group_size:
        raise ConfigError(f"{len(scores)} scores are not groups of {group_size}: keep a prompt's answers together")
    return scores.reshape(-1, group_size)


def _nanstd(values: Tensor, dim: int) -> Tensor:
    """Over n - 1, NaN left out, as a column; NaN where fewer than two are left."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1)).masked_fill(count < 2, math.nan).sqrt()


def _sorted(owners: Tensor) -> Tensor:
    """Owners, whose tokens must stand row after row."""
    if bool((owners[1:] < owners[:-1]).any()):
        raise ValueError("owners must be sorted: the tokens of each answer together, in their order")
    return owners
