"""A round of reinforcement against plain loops over full logits: what each answer is weighed by, and what is kept."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kitout import IA3, Kit, LoRA
from kitout.align.config.losses import GRPOLoss, PPOLoss, RLOOLoss
from kitout.align.rewards.random_state import fixed_random_state
from kitout.align.rewards.reward import AnswerBatch, WeightedRewards
from kitout.align.rollout import SamplingSettings
from kitout.align.rounds import Roles, RoundPlan, Rounds
from kitout.align.scalar_head import head_path, scalar_head
from kitout.data.encode.item import EncodedPrompt
from kitout.errors import ConfigError
from kitout.train.metrics_log import MetricsLog, read_metrics
from train.fixtures import add, kit_of
from zoo import ZOO, tokenizer_of

PROMPTS = [EncodedPrompt(tuple(range(7, 7 + n)), f"p{n}", {}, f"row {n}") for n in (3, 5, 4, 6)]
TEMPERATURE, MAX_TOKENS, SAMPLES = 0.7, 5, 2


class ByLength:
    """A reward of one's own: the sum of the answer's ids, hundredths; every third answer is not judged."""

    name = "own"
    judges = True

    def score(self, answers: AnswerBatch) -> list[float | None]:
        if not self.judges:
            return [None] * len(answers)
        own = [sum(row.input_ids[row.prompt_length :]) / 100 for row in answers.encoded]
        return [None if i % 3 == 2 else value for i, value in enumerate(own)]


@pytest.fixture(scope="module")
def kit() -> Kit:
    kit = kit_of("llama", dtype=torch.float64)
    add(kit, "policy", LoRA(rank=2), seed=1)
    add(kit, "reference", IA3(), seed=2)
    add(kit, "value", LoRA(rank=2), {head_path(kit): scalar_head(kit, 3)}, seed=3)
    return kit


def rounds_of(kit: Kit, loss: Any, folder: Path, reward: Any = None) -> Rounds:
    passes = {"epochs": 1, "iterations": 1} | loss.model_dump()
    plan = RoundPlan.of([[0, 1], [2, 3]], SAMPLES, passes["epochs"] * passes["iterations"], 1, None, seed=5)
    value = "value" if isinstance(loss, PPOLoss) else None
    return Rounds(
        kit, tokenizer_of(ZOO["llama"]), Roles("policy", "reference", value), PROMPTS, plan, loss,
        SamplingSettings(temperature=TEMPERATURE, max_new_tokens=MAX_TOKENS),
        WeightedRewards((reward or ByLength(),), (2.0,)), 5, MetricsLog(folder / "completions.jsonl"),
    )  # fmt: skip


@torch.no_grad()
def log_probs(kit: Kit, adapter: str, ids: tuple[int, ...], start: int) -> list[float]:
    with kit.use(adapter):
        logits = kit(input_ids=torch.tensor([ids])).logits[0] / TEMPERATURE
    return [float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in range(start, len(ids))]


@torch.no_grad()
def state_values(kit: Kit, ids: tuple[int, ...], start: int) -> list[float]:
    with kit.use("value"):
        scores = kit(input_ids=torch.tensor([ids])).logits[0, :, 0]
    return [float(scores[t - 1]) for t in range(start, len(ids))]


def by_ids(rounds: Rounds) -> dict[tuple[int, ...], Any]:
    return {answer.row.input_ids: answer for answer in rounds.answers}


def test_ppo_weighs_tokens_as_plain_loops_do(kit: Kit, tmp_path: Path) -> None:
    loss = PPOLoss(beta=0.3, gamma=0.9, lambda_=0.8, epochs=2, missing_end_penalty=0.5)
    rounds = rounds_of(kit, loss, tmp_path)
    rounds.before_step(0)
    assert all(answer.old is None for answer in rounds.answers)  # the policy of this step wrote them
    rounds.before_step(1)
    lines = read_metrics(tmp_path / "completions.jsonl")
    plain: list[tuple[Any, list[float], list[float], list[float]]] = []
    kls = []
    left_out = [answer for answer in rounds.answers if not answer.row.num_targets]
    assert len(left_out) == sum(line["total"] is None for line in lines) == 1
    assert all(len(answer.advantages) == len(answer.returns) == 0 for answer in left_out)
    for answer in rounds.answers:
        ids, start = answer.row.input_ids, answer.row.prompt_length
        if answer in left_out:
            continue
        old, reference = (log_probs(kit, name, ids, start) for name in ("policy", "reference"))
        values = state_values(kit, ids, start)
        assert torch.allclose(answer.old, torch.tensor(old), atol=1e-5)
        assert torch.allclose(answer.values, torch.tensor(values), atol=1e-5)
        kls.append(sum(o - q for o, q in zip(old, reference, strict=True)))
        rewards = [-0.3 * (o - q) for o, q in zip(old, reference, strict=True)]
        ended = ids[-1] == rounds.tokenizer.eos_token_id
        rewards[-1] += 2.0 * sum(ids[start:]) / 100 - (0.0 if ended else 0.5)
        advantage, advantages = 0.0, [0.0] * len(values)
        for t in reversed(range(len(values))):
            following = values[t + 1] if t + 1 < len(values) else 0.0
            advantage = rewards[t] + 0.9 * following - values[t] + 0.9 * 0.8 * advantage
            advantages[t] = advantage
        plain.append((answer, advantages, [a + v for a, v in zip(advantages, values, strict=True)], values))
    every = np.array([a for _, advantages, _, _ in plain for a in advantages])
    for answer, advantages, returns, _ in plain:
        whitened = (np.array(advantages) - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)
        assert np.allclose(answer.advantages.numpy(), whitened, atol=1e-4)
        assert np.allclose(answer.returns.numpy(), returns, atol=1e-4)
    assert rounds.last["kl_to_reference"] == pytest.approx(sum(kls) / len(kls), abs=1e-4)


def test_a_round_in_progress_comes_back_from_a_checkpoint(kit: Kit, tmp_path: Path) -> None:
    loss = GRPOLoss(beta=0.1, iterations=2)
    rounds = rounds_of(kit, loss, tmp_path)
    rounds.before_step(0)
    values, tensors = rounds.state()
    rounds.before_step(1)
    resumed = rounds_of(kit, loss, tmp_path)
    resumed.restore(values, tensors)
    resumed.before_step(1)
    for one, other in zip(rounds.answers, resumed.answers, strict=True):
        assert one.row == other.row
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("advantages", "old", "reference"))


@pytest.mark.parametrize("loss", [GRPOLoss(beta=0.1), RLOOLoss(), PPOLoss(epochs=1)])
def test_a_later_round_that_nobody_judges_teaches_nothing_and_the_first_is_an_error(
    loss: Any, kit: Kit, tmp_path: Path
) -> None:
    reward = ByLength()
    rounds = rounds_of(kit, loss, tmp_path, reward)
    rounds.before_step(0)
    reward.judges = False
    with pytest.warns(RuntimeWarning, match="no reward source judged any of the 4 answers"):
        rounds.before_step(1)
    weights: list[Tensor] = [answer.advantages for answer in rounds.answers]
    assert not torch.cat(weights).any()
    with pytest.raises(ConfigError, match="step 1: no reward source judged any of the 4 answers"):
        rounds_of(kit, loss, tmp_path, reward).before_step(0)


def test_draws_of_a_reward_function_follow_from_the_seed_and_move_no_others() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = draw(), draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = draw()
    with fixed_random_state(7):
        one = draw()
    with fixed_random_state(7):
        assert draw() == one
    with fixed_random_state(2**62):
        assert draw() != one
    assert (first, draw()) == expected
