"""Advantages of groups against TRL's own rollout code; GAE, whitening and missing scores at their edges."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from align.losses.trl_stand_in import check_close, logged, owners_of, pad_rows, stand_in, trainer_class
from kitout.align.losses.advantages import (
    explained_variance,
    gae,
    group_advantages,
    has_spread,
    rloo_advantages,
    score_shift,
    score_tensor,
    scores_without_end,
    token_rewards,
    whiten,
)
from kitout.align.losses.divergence import k1
from kitout.data.by_row import sum_by_row
from kitout.errors import ConfigError

LENGTHS = [3, 7, 1, 2, 5, 4, 2, 2, 3, 1, 2, 6]
OWNERS, ROWS, TOKENS = owners_of(LENGTHS), len(LENGTHS), sum(LENGTHS)
REWARDS = {
    "all scored": [1.0, 0.0, 0.5, 3.0, -2.0, 0.1, 7.0, 1e-3, 100.0, 101.0, 99.0, 100.5],
    "no spread": [0.1] * 4 + [1.0, 0.0, 1.0, 0.0] + [-3.0] * 4,
    "some None": [1.0, None, 0.5, 3.0, None, None, 2.0, 4.0, 1.0, 0.0, None, 0.0],
    "one left, none left": [1.0, None, None, None] + [None] * 4 + [2.0, 3.0, 5.0, 7.0],
}


def of_trl(name: str, rewards: list[float | None], **settings: Any) -> tuple[Tensor, dict[str, float]]:
    """The advantages of TRL's own rollout code, four answers to a prompt."""
    trainer = trainer_class(name)
    old, reference = settings.pop("log_probs", (torch.zeros(TOKENS),) * 2)
    args = {
        "per_device_train_batch_size": ROWS,
        "gradient_checkpointing_kwargs": None,
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 1,
    }
    me = stand_in(
        trainer,
        args=args,
        model=types.SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model="reference",
        environment_factories=None,
        environments=None,
        tools=None,
        _tokenizer=types.SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_iterations=1,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        num_generations=4,
        reward_func_names=["reward"],
        reward_funcs=[None],
        reward_weights=torch.ones(1, dtype=torch.float64),
        multi_objective_aggregation="sum_then_normalize",
        reward_clip_range=None,
        _logs={
            "prompt": [],
            "completion": [],
            "rewards": {"reward": []},
            "advantages": [],
            "images": [],
        },
        _pending_extra_logs={},
        _pending_metrics={},
        log_multimodal=False,
        **settings,
    )
    ids = [[1] * length for length in LENGTHS]
    generated = [[[1]] * ROWS, ids, None, ["text"] * ROWS, None, {}, None, None]
    me._generate = lambda prompts: generated if name == "GRPOTrainer" else [generated[i] for i in (0, 1, 3)]
    scores = [[math.nan if reward is None else reward] for reward in rewards]
    me._calculate_rewards = lambda *_: torch.tensor(scores, dtype=torch.float64)
    me._get_per_token_logps_and_entropies = lambda model, *_, **__: (
        pad_rows(reference if model == "reference" else old, LENGTHS),
        None,
        None,
    )
    output = trainer._generate_and_score_completions(me, [{"prompt": "text"}] * ROWS)
    return output["advantages"], logged(me)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_groups_are_trl(rewards: list[float | None], scale: Any) -> None:
    theirs, metrics = of_trl("GRPOTrainer", rewards, scale_rewards=scale, beta=0.0)
    scores = score_tensor(rewards)
    ours = group_advantages(scores, 4, scale)
    check_close(ours, theirs)  # TRL takes n / (n - 1) in float32
    assert all(ours[row] == 0 for row, reward in enumerate(rewards) if reward is None)
    assert (ours.reshape(-1, 4)[~has_spread(scores, 4)] == 0).all()
    if None not in rewards and scale != "batch":  # TRL's spread of one score is no number, and counts as spread
        check_close((~has_spread(scores, 4)).double().mean(), metrics["frac_reward_zero_std"])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_leave_one_out_is_trl(rewards: list[float | None], beta: float, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    old, reference = -torch.rand(2, TOKENS, generator=generator, dtype=torch.float64)
    theirs, _ = of_trl("RLOOTrainer", rewards, beta=beta, normalize_advantages=normalize, log_probs=(old, reference))
    kl = sum_by_row(k1(old, reference), OWNERS, ROWS) if beta else None
    ours = rloo_advantages(score_tensor(rewards), 4, kl=kl, beta=beta, normalize=normalize)
    check_close(ours, theirs)


def test_no_spread_is_0_to_the_bit() -> None:
    """The mean of three times 0.1 is not 0.1, and the rest of 1e-17 is divided by 1e-4."""
    for dtype in (torch.float32, torch.float64):
        for scale in ("group", "batch", "none"):
            advantages = group_advantages(torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 4.0], dtype=dtype), 3, scale)
            assert advantages.dtype == dtype
            assert advantages[:3].tolist() == [0.0] * 3


def test_two_answers_alike_have_advantage_0() -> None:
    """At n = 2 the spread of a tie is 0: no number elsewhere."""
    scores = score_tensor([0.3, 0.3, None, 1.0, None, None, 1.0, 0.0])
    for scale in ("group", "batch", "none"):
        advantages = group_advantages(scores, 2, scale)
        assert advantages[:6].tolist() == [0.0] * 6
        assert advantages[6] > 0 > advantages[7]
    assert rloo_advantages(scores, 2).tolist() == [0.0] * 6 + [1.0, -1.0]
    assert has_spread(scores, 2).tolist() == [False, False, False, True]


@pytest.mark.parametrize("advantages", [group_advantages, rloo_advantages, has_spread])
def test_groups_of_one_are_refused(advantages: Any) -> None:
    with pytest.raises(ConfigError, match=r"n=1: .* write n=2 or more"):
        advantages(torch.ones(4), 1)
    with pytest.raises(ConfigError, match="5 scores are not groups of 2"):
        advantages(torch.ones(5), 2)


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="write group, batch or none"):
        group_advantages(torch.ones(4), 2, "std")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="answer 1 is nan: return a finite number, or None"):
        score_tensor([1.0, math.nan])
    with pytest.raises(ConfigError, match="leave it out"):
        token_rewards(score_tensor([None]), torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="sorted"):
        gae(torch.zeros(3), torch.zeros(3), torch.tensor([0, 1, 0]), 2)


def test_a_score_comes_with_the_last_token_of_its_answer() -> None:
    owners = torch.tensor([0, 0, 2, 2, 2])
    old, reference = torch.tensor([-1.0, -2, -3, -4, -5]), torch.tensor([-1.0, -1, -3, -3, -5])
    rewards = token_rewards(score_tensor([10.0, 99.0, 20.0]), old, reference, owners, 3, beta=0.5)
    assert rewards.tolist() == [0.0, 10.5, 0.0, 0.5, 20.0]  # the second answer has no token
    assert token_rewards(score_tensor([]), old[:0], reference[:0], owners[:0], 0).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_at_its_limits(dtype: torch.dtype) -> None:
    """lam = 1: returns are the rewards to come. lam = 0: one step. Both end with their answer."""
    owners = torch.tensor([0, 0, 2, 2, 2])
    rewards, values = torch.tensor([[1.0, 2, 3, 4, 5], [0.5, 1.0, -1, 0, 7]], dtype=dtype)
    advantages, returns = gae(rewards, values, owners, 3, lam=1.0)
    assert advantages.dtype == returns.dtype == dtype
    check_close(returns, [3, 2, 12, 9, 5])
    check_close(advantages, [2.5, 1.0, 13, 9, -2])
    check_close(gae(rewards, values, owners, 3, gamma=0.5, lam=0.0)[0], [1.0, 1.0, 4.0, 7.5, -2.0])
    assert gae(rewards[:0], values[:0], owners[:0], 2)[0].tolist() == []


def test_whitening_of_what_the_mask_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator, dtype=torch.float64) * 3 + 7
    mask = torch.arange(50) % 3 > 0
    whitened = whiten(values, mask)
    check_close(whitened[mask].mean(), 0.0)
    check_close(whitened[mask].std(), 1.0)
    assert (whitened[~mask] == 0).all()
    check_close(whiten(values, mask, shift_mean=False)[mask].mean(), values[mask].mean())
    hidden = values.masked_fill(~mask, math.nan)
    assert torch.equal(whiten(hidden, mask), whitened)
    assert whiten(values[:1]).tolist() == [0.0]
    assert whiten(values[:0]).tolist() == []
    assert whiten(torch.full((3,), 2.5)).tolist() == [0.0] * 3


def test_answers_without_end() -> None:
    scores, has_end = score_tensor([2.0, 2.0, None]), torch.tensor([True, False, False])
    check_close(scores_without_end(scores, has_end, penalty=1.5)[:2], [2.0, 0.5])
    check_close(scores_without_end(scores, has_end, fixed=-1.0)[:2], [2.0, -1.0])
    assert scores_without_end(scores, has_end, fixed=-1.0)[2].isnan()
    assert torch.equal(scores_without_end(scores, has_end)[:2], scores[:2])


def test_shift_of_the_scores() -> None:
    scores = score_tensor([1.0, None, 4.0])
    assert score_shift(scores) == -2.5
    check_close((scores + score_shift(scores)).nanmean(), 0.0)
    assert score_shift(score_tensor([None])) == 0.0


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns + 3, returns) == 1.0
    check_close(explained_variance(torch.zeros(3), returns), 0.0)
    assert explained_variance(-returns, returns) < 0
    assert math.isnan(explained_variance(returns, torch.ones(3)))
    assert math.isnan(explained_variance(returns[:0], returns[:0]))
