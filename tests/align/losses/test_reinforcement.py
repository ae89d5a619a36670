"""Losses of reinforcement, their gradients and metrics against TRL's own methods; PPO against plain loops."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from align.losses.trl_stand_in import (
    check_close,
    gradients,
    logged,
    owners_of,
    pad_rows,
    stand_in,
    trainer_class,
)
from kitout.align.losses.advantages import gae, token_rewards, whiten
from kitout.align.losses.divergence import k3
from kitout.align.losses.reinforcement import grpo_loss, num_targets, ppo_policy_loss, ppo_value_loss, rloo_loss
from kitout.errors import ConfigError

LENGTHS = [3, 7, 1, 2, 5, 4]
OWNERS, ROWS, TOKENS = owners_of(LENGTHS), len(LENGTHS), sum(LENGTHS)
MAX_LENGTH = 9
ADVANTAGES = torch.tensor([1.5, -0.7, 0.0, 2.0, -1.0, 0.3], dtype=torch.float64)


def tokens(seed: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(TOKENS, generator=generator, dtype=torch.float64) * size - 0.05


def policies(size: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities now, at the rollout and of the reference; entropies."""
    return tokens(0, size).requires_grad_(), tokens(1, size), tokens(2, size), -tokens(3)


def rollout(**more: Any) -> dict[str, Tensor]:
    mask = pad_rows(torch.ones(TOKENS, dtype=torch.int64), LENGTHS)
    prompt = torch.ones(ROWS, 2, dtype=torch.int64)
    ids = torch.zeros_like(mask)
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": ADVANTAGES,
        "num_items_in_batch": mask.sum(),
        **more,
    }


def of_trl(name: str, log_probs: Tensor, entropy: Tensor, inputs: dict[str, Tensor], **settings: Any) -> Any:
    trainer = trainer_class(name)
    settings["args"] = {"delta": None, "steps_per_generation": 1} | settings.get("args", {})
    me = stand_in(
        trainer,
        model=types.SimpleNamespace(training=True),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        _entropy_bonus_enabled=False,
        **settings,
    )
    table = pad_rows(log_probs, LENGTHS), pad_rows(entropy, LENGTHS)
    me._get_per_token_logps_and_entropies = lambda *_, **__: (*table, None)
    return trainer._compute_loss(me, None, inputs), logged(me)


@pytest.mark.parametrize("size", [0.3, 3.0, 60.0], ids=["near", "far", "very far"])
@pytest.mark.parametrize("clip_high", [None, 0.28])
@pytest.mark.parametrize(("beta", "correct_kl"), [(0.0, True), (0.04, True), (0.3, False)])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_groups_are_trl(kind: Any, beta: float, correct_kl: bool, clip_high: float | None, size: float) -> None:
    now, old, reference, entropy = policies(size)
    inputs = rollout(old_per_token_logps=pad_rows(old, LENGTHS), ref_per_token_logps=pad_rows(reference, LENGTHS))
    theirs, metrics = of_trl(
        "GRPOTrainer",
        now,
        entropy,
        inputs,
        args={"use_bias_correction_kl": correct_kl},
        loss_type=kind,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=clip_high or 0.2,
    )
    settings = {"clip_high": clip_high, "beta": beta, "correct_kl": correct_kl, "entropy": entropy}
    if beta:
        settings["reference"] = reference
    losses, ours = grpo_loss(now, old, ADVANTAGES, OWNERS, ROWS, kind, **settings)
    assert losses.shape == (ROWS,)
    assert not any(each.requires_grad for each in ours.values())
    counts = [num_targets(kind, length, MAX_LENGTH) for length in LENGTHS]
    loss = losses.sum() / sum(counts)
    check_close(loss, theirs, 1e-10)
    check_close(gradients(loss, now)[0], gradients(theirs, now)[0], 1e-10)
    share = torch.tensor(LENGTHS) / TOKENS  # TRL's metrics are means over tokens
    check_close(ours["clip_fraction"] @ share.double(), metrics["clip_ratio/region_mean"])
    check_close(ours["entropy"] @ share.double(), metrics["entropy"])
    assert ("kl" in ours) == bool(beta)
    if beta:
        check_close(ours["kl"].sum() / TOKENS, metrics["kl"])


@pytest.mark.parametrize("size", [0.05, 3.0, 60.0], ids=["near", "far", "very far"])
@pytest.mark.parametrize("clip_high", [None, 0.28])
def test_rloo_is_trl(clip_high: float | None, size: float) -> None:
    now, old, _, entropy = policies(size)
    inputs = rollout(old_logps=pad_rows(old, LENGTHS).sum(1))
    theirs, metrics = of_trl("RLOOTrainer", now, entropy, inputs, epsilon_low=0.2, epsilon_high=clip_high or 0.2)
    losses, ours = rloo_loss(now, old, ADVANTAGES, OWNERS, ROWS, clip_high=clip_high, entropy=entropy)
    loss = losses.sum() / sum(num_targets("rloo", length, MAX_LENGTH) for length in LENGTHS)
    check_close(loss, theirs, 1e-10)
    check_close(gradients(loss, now)[0], gradients(theirs, now)[0], 1e-10)
    check_close(ours["clip_fraction"].mean(), metrics["clip_ratio/region_mean"])
    check_close(ours["entropy"] @ (torch.tensor(LENGTHS) / TOKENS).double(), metrics["entropy"])


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_policy_that_has_not_moved(kind: Any, dtype: torch.dtype) -> None:
    """Ratio 1 and KL 0, exactly, and a gradient all the same: what is given as old or reference has none."""
    now = tokens(0).to(dtype).requires_grad_()
    losses, metrics = grpo_loss(now, now, ADVANTAGES, OWNERS, ROWS, kind, beta=0.1, reference=now)
    assert (metrics["ratio"] == 1).all()
    assert (metrics["kl"] == 0).all()
    assert (metrics["clip_fraction"] == 0).all()
    counts = torch.tensor([1 if kind == "grpo" else length for length in LENGTHS])
    check_close(losses, -ADVANTAGES * counts, 1e-6)
    per_token = -ADVANTAGES[OWNERS] * (1 / torch.tensor(LENGTHS)[OWNERS] if kind == "grpo" else 1.0)
    check_close(gradients(losses.sum(), now)[0], per_token, 4e-3 if dtype == torch.bfloat16 else 1e-6)
    assert (k3(now, now) == 0).all()
    losses, metrics = rloo_loss(now, now, ADVANTAGES, OWNERS, ROWS)
    assert (metrics["ratio"] == 1).all()
    check_close(losses, -ADVANTAGES)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_ratios_beyond_float32_have_gradients(beta: float) -> None:
    """Where the clip holds a term, exp(200) in the other one must not make 0 * inf of its gradient."""
    now = torch.tensor([-0.1, -200.1, -0.1, -torch.inf], requires_grad=True)
    old = torch.tensor([-200.1, -0.1, -0.1, -0.1])
    owners, advantages = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    reference = torch.tensor([-200.0, -0.1, -300.0, -0.2])
    losses, metrics = grpo_loss(now, old, advantages, owners, 4, beta=beta, reference=reference)
    assert losses.isfinite().all()
    assert gradients(losses.sum(), now)[0].isfinite().all()
    assert metrics["clip_fraction"].tolist() == [1.0, 1.0, 0.0, 1.0]
    losses, _ = rloo_loss(now, old, advantages, owners, 4)
    check_close(losses, [-1.2, 0.8, -1.0, 0.8])
    assert gradients(losses.sum(), now)[0].tolist() == [0.0, 0.0, -1.0, 0.0]


def test_answers_without_a_token_or_an_advantage_have_no_loss() -> None:
    now, old, _, entropy = policies(1.0)
    for kind in ("grpo", "dapo", "dr_grpo"):
        losses, metrics = grpo_loss(
            now, old, torch.cat([ADVANTAGES, torch.ones(1)]), OWNERS, ROWS + 1, kind, entropy=entropy
        )
        assert losses[-1] == 0
        assert losses[2] == 0
        assert all(each[:-1].isfinite().all() and each[-1].isnan() for each in metrics.values())


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_of_any_size_and_order_give_the_same(kind: Any) -> None:
    now, old, reference, _ = policies(1.0)
    whole, _ = grpo_loss(now, old, ADVANTAGES, OWNERS, ROWS, kind, beta=0.1, reference=reference)
    for rows in ([4], [5, 0], [3, 1, 2]):
        index = torch.cat([OWNERS.eq(row).nonzero().flatten() for row in rows])
        owners = owners_of([LENGTHS[row] for row in rows])
        part, _ = grpo_loss(
            now[index], old[index], ADVANTAGES[rows], owners, len(rows), kind, beta=0.1, reference=reference[index]
        )
        check_close(part, whole[rows], 1e-12)


@pytest.mark.parametrize("size", [0.8, 3.0])
@pytest.mark.parametrize(("gamma", "lam", "beta", "clip"), [(1.0, 0.95, 0.05, 0.2), (0.9, 0.5, 0.3, 0.1)])
def test_ppo_is_its_plain_loop(gamma: float, lam: float, beta: float, clip: float, size: float) -> None:
    now, old, reference, _ = policies(size)
    old_values = tokens(5, 3.0)
    values = (old_values + tokens(6) + 0.5).requires_grad_()
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -0.25], dtype=torch.float64)

    starts = [sum(LENGTHS[:row]) for row in range(ROWS)]
    advantages, returns = [0.0] * TOKENS, [0.0] * TOKENS
    for start, length, score in zip(starts, LENGTHS, scores.tolist(), strict=True):
        for t in reversed(range(start, start + length)):
            is_last = t == start + length - 1
            reward = -beta * (old[t].item() - reference[t].item()) + (score if is_last else 0.0)
            next_value = 0.0 if is_last else old_values[t + 1].item()
            delta = reward + gamma * next_value - old_values[t].item()
            advantages[t] = delta + (0.0 if is_last else gamma * lam * advantages[t + 1])
            returns[t] = advantages[t] + old_values[t].item()
    mean = sum(advantages) / TOKENS
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / (TOKENS - 1) + 1e-8)
    policy_loss = value_loss = torch.zeros((), dtype=torch.float64)
    clipped = 0
    for t in range(TOKENS):
        a = (advantages[t] - mean) / deviation
        rho = torch.exp(now[t] - old[t])
        bounded = min(max(rho.item(), 1 - clip), 1 + clip)
        if -a * rho.item() < -a * bounded:
            policy_loss, clipped = policy_loss + -a * bounded, clipped + 1
        else:
            policy_loss = policy_loss + -a * rho
        bounded = min(max(values[t].item(), old_values[t].item() - 0.2), old_values[t].item() + 0.2)
        error = (values[t] - returns[t]) ** 2
        if (bounded - returns[t]) ** 2 > error.item():
            error = torch.tensor((bounded - returns[t]) ** 2, dtype=torch.float64)
        value_loss = value_loss + 0.5 * error

    rewards = token_rewards(scores, old, reference, OWNERS, ROWS, beta=beta)
    our_advantages, our_returns = gae(rewards, old_values, OWNERS, ROWS, gamma=gamma, lam=lam)
    check_close(our_advantages, advantages, 1e-12)
    check_close(our_returns, returns, 1e-12)
    policy, metrics = ppo_policy_loss(now, old, whiten(our_advantages), OWNERS, ROWS, clip=clip)
    value, value_metrics = ppo_value_loss(values, old_values, our_returns, OWNERS, ROWS)
    assert policy.shape == value.shape == (ROWS,)
    targets = sum(num_targets("ppo", length, MAX_LENGTH) for length in LENGTHS)
    total, expected = (policy + 0.1 * value).sum() / targets, (policy_loss + 0.1 * value_loss) / TOKENS
    check_close(total, expected, 1e-10)
    for ours, theirs in zip(gradients(total, now, values), gradients(expected, now, values), strict=True):
        check_close(ours, theirs, 1e-10)
    assert 0 < clipped < TOKENS
    check_close(metrics["clip_fraction"] @ torch.tensor(LENGTHS).double(), clipped)
    assert 0 < value_metrics["value_clip_fraction"].mean() < 1


def test_what_is_given_gets_no_gradient() -> None:
    now, *given = (tokens(seed).requires_grad_() for seed in range(4))
    advantages = ADVANTAGES.clone().requires_grad_()
    losses = [
        grpo_loss(now, given[0], advantages, OWNERS, ROWS, beta=0.1, reference=given[1])[0],
        rloo_loss(now, given[0], advantages, OWNERS, ROWS)[0],
        ppo_policy_loss(now, given[0], given[2], OWNERS, ROWS)[0],
        ppo_value_loss(now, given[0], given[1], OWNERS, ROWS)[0],
    ]
    for loss in losses:
        grads = torch.autograd.grad(loss.sum(), [now, *given, advantages], allow_unused=True)
        assert grads[0] is not None
        assert all(grad is None for grad in grads[1:])


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"kind": "bnpo"}, "write grpo, dapo or dr_grpo"),
        ({"beta": 0.1}, "give its log-probabilities"),
        ({"clip": 0.0}, "above 0"),
        ({"clip_high": -0.2}, "above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], hint: str) -> None:
    now = tokens(0)
    with pytest.raises(ConfigError, match=hint):
        grpo_loss(now, now, ADVANTAGES, OWNERS, ROWS, **settings)
