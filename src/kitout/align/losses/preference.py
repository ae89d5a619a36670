"""Losses of preferences: reward (Bradley-Terry), DPO and its kin, ORPO, SimPO, KTO.

Each takes one number per answer, made from log-probabilities of tokens by `sequence_log_ratios` or `mean_by_row`, and
returns each item's loss [B] with its gradient and a dict of metrics [B] without (nan: it has none). An item counts as
one target: the loop takes the weighted sum, so micro-batches of any size and order give the same loss.
It knows no reference model: its log-probabilities are given.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kitout.align.losses.divergence import log_ratio
from kitout.data.by_row import sum_by_row
from kitout.errors import ConfigError
from kitout.train.objectives.chunked_cross_entropy import at_least_float32

PairLoss = Literal["sigmoid", "ipo", "hinge"]
ItemLosses = tuple[Tensor, dict[str, Tensor]]


def sequence_log_ratios(log_probs: Tensor, reference: Tensor, owners: Tensor, rows: int) -> Tensor:
    """[rows]: log p(answer) - log q(answer), the tokens' differences in float32 and then their sum.

    log_probs, reference, owners: [N], of the answers' tokens, end token included.
    """
    return sum_by_row(log_ratio(log_probs, reference.detach()), owners, rows)


def chosen_and_rejected(values: Tensor) -> tuple[Tensor, Tensor]:
    """[2B] of answers, pair after pair with the chosen one first -> [B] of the chosen, [B] of the rejected."""
    chosen, rejected = values.reshape(-1, 2).unbind(1)
    return chosen, rejected


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact near 0 and far from it (Maechler 2012, "Accurately computing log(1 - exp)").

    x above -eps of its dtype, 0 included, has value and gradient of -eps, finite where exp(x) rounds to 1. The gradient
    1 / eps is meant: a certain token's log-probability hardly moves with its logits, and their product is about 1.
    """
    eps = torch.finfo(x.dtype).eps
    x = torch.where(x > -eps, x - (x + eps).detach(), x)
    return torch.where(x > -math.log(2.0), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def reward_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | float = 0.0, *, centering: float = 0.0
) -> ItemLosses:
    """-log sigmoid(r_c - r_r - margin) + centering * (r_c + r_r)^2, of a reward model's scores.

    chosen, rejected: [B], scores of the two answers. margins: [B], by how much the chosen one is better, in units of
    the score. centering: pulls the scores' mean to 0, which no pair says (Eisenstein et al. 2023, arXiv:2312.09244);
    0.01 is usual. Metrics: chosen_reward, rejected_reward, margin, accuracy.
    """
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    losses = -F.logsigmoid(chosen - rejected - margins)
    if centering:
        losses = losses + centering * (chosen + rejected).square()
    return losses, _pair_metrics(chosen, rejected)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    kind: PairLoss = "sigmoid",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> ItemLosses:
    """Direct preference optimization, h = (l_c - ref_c) - (l_r - ref_r).

    chosen, rejected: [B], `sequence_log_ratios` of the two answers. kind:
    "sigmoid": -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing, the share of pairs thought to
    be swapped, below 0.5 (Rafailov et al. 2023, arXiv:2305.18290, eq. 7; e > 0 is cDPO, their note on conservative
    DPO);
    "hinge": relu(1 - beta h) (SLiC, Zhao et al. 2023, arXiv:2305.10425, as in RSO, Liu et al. 2023, arXiv:2309.06657);
    "ipo": (h' - 1 / (2 beta))^2, h' of log-ratios per token (Azar et al. 2023, arXiv:2310.12036, eq. 17; the mean per
    token as in TRL), which needs lengths: [B] and [B], tokens of the two answers.
    Metrics: chosen_reward and rejected_reward (beta times the log-ratio), margin, accuracy. ConfigError on a setting
    that the kind does not take.
    """
    _check_above_0(beta=beta)
    if not 0.0 <= label_smoothing < 0.5 or (label_smoothing and kind != "sigmoid"):
        raise ConfigError(
            f"label_smoothing={label_smoothing} with the {kind} loss: write 0, or with sigmoid a number below 0.5"
        )
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    if kind == "sigmoid":
        losses = _smoothed(beta * (chosen - rejected), label_smoothing)
    elif kind == "hinge":
        losses = torch.relu(1.0 - beta * (chosen - rejected))
    elif kind == "ipo":
        if lengths is None:
            raise ConfigError("the ipo loss is per token: give lengths=(tokens of the chosen, tokens of the rejected)")
        of_chosen, of_rejected = (length.clamp(min=1) for length in lengths)
        losses = (chosen / of_chosen - rejected / of_rejected - 0.5 / beta).square()
    else:
        raise ConfigError(f"no loss of pairs is called {kind!r}: write sigmoid, ipo or hinge")
    return losses, _pair_metrics(beta * chosen, beta * rejected)


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> ItemLosses:
    """nll(chosen) - beta * log sigmoid(log odds_c - log odds_r), log odds = m - log(1 - exp m) (arXiv:2403.07691).

    chosen, rejected: [B], the mean log-probability of the answers' tokens, m. nll is -m of the chosen answer: the mean
    over its own tokens, the prompt left out (TRL takes the mean over all tokens of the micro-batch, prompts included).
    Metrics: nll, log_odds_ratio, chosen_reward and rejected_reward (beta m), margin, accuracy.
    """
    _check_above_0(beta=beta)
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    losses = -chosen - beta * F.logsigmoid(log_odds)
    metrics = {"nll": -chosen.detach(), "log_odds_ratio": log_odds.detach()}
    return losses, metrics | _pair_metrics(beta * chosen, beta * rejected)


def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 0.5, cpo_alpha: float = 0.0
) -> ItemLosses:
    """-log sigmoid(beta (m_c - m_r) - gamma) + cpo_alpha * nll(chosen) (Meng et al. 2024, arXiv:2405.14734, eq. 6).

    chosen, rejected: [B], the mean log-probability of the answers' tokens, m. gamma: the margin asked for; the paper
    has beta from 2 to 2.5 and gamma / beta from 0.3 to 0.5. cpo_alpha: weight of -m of the chosen answer, 0 in SimPO
    (TRL's default is 1). Metrics: chosen_reward and rejected_reward (beta m), margin, accuracy, nll.
    """
    _check_above_0(beta=beta)
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    losses = -F.logsigmoid(beta * (chosen - rejected) - gamma)
    if cpo_alpha:
        losses = losses - cpo_alpha * chosen
    return losses, {"nll": -chosen.detach()} | _pair_metrics(beta * chosen, beta * rejected)


@torch.no_grad()
def kto_reference_point(mismatched: Tensor) -> Tensor:
    """z, a scalar: max(0, mean of `sequence_log_ratios` of answers to other prompts), an estimate of the KL divergence.

    mismatched: [M], of the whole batch and not of one micro-batch; 0 where M = 0.
    """
    return at_least_float32(mismatched).sum().div(max(1, len(mismatched))).clamp(min=0.0)


def kto_loss(
    log_ratios: Tensor,
    is_desirable: Tensor,
    z: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> ItemLosses:
    """w_d (1 - sigmoid(beta (k - z))) of a desirable answer, w_u (1 - sigmoid(beta (z - k))) of an undesirable one.

    log_ratios: [B], `sequence_log_ratios` k of each answer. is_desirable: [B] of bool. z: `kto_reference_point`
    (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7). Metrics: chosen_reward of a desirable answer and rejected_reward
    of an undesirable one (beta k; nan for the other kind), margin (beta (k - z), its sign changed where the answer is
    undesirable), accuracy (margin above 0), kl (z).
    """
    _check_above_0(beta=beta)
    log_ratios = at_least_float32(log_ratios)
    z = torch.as_tensor(z, dtype=log_ratios.dtype, device=log_ratios.device).detach()
    margins = beta * torch.where(is_desirable, log_ratios - z, z - log_ratios)
    weights = torch.where(is_desirable, margins.new_tensor(desirable_weight), margins.new_tensor(undesirable_weight))
    rewards = beta * log_ratios.detach()
    metrics = {
        "chosen_reward": rewards.masked_fill(~is_desirable, math.nan),
        "rejected_reward": rewards.masked_fill(is_desirable, math.nan),
        "margin": margins.detach(),
        "accuracy": (margins.detach() > 0).to(margins.dtype),
        "kl": z.expand_as(margins),
    }
    return weights * torch.sigmoid(-margins), metrics


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """The cross-entropy of a coin that says so and is wrong in this share of the cases."""
    losses = -F.logsigmoid(logits)
    if label_smoothing:
        losses = (1.0 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return losses


def _pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Of rewards; a tie is no success."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).to(chosen.dtype),
    }


def _check_above_0(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}: write a number above 0")
