"""A policy that is its reference: ratios of 1, no KL, no margin, through sampling, scoring and the objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kitout import Houlsby, Kit, LoRA, PrefixTuning, PromptTuning
from kitout.align.config.losses import DPOLoss, GRPOLoss, KTOLoss, PPOLoss, RLOOLoss
from kitout.align.objectives.kto import KTOObjective, mismatched_rows
from kitout.align.objectives.policy import PolicyObjective, SampledAnswer
from kitout.align.objectives.preference_objective import PreferenceObjective
from kitout.align.reference import reference_scores
from kitout.align.rewards.reward import AnswerBatch, WeightedRewards
from kitout.align.rollout import SamplingSettings
from kitout.align.rounds import Roles, RoundPlan, Rounds
from kitout.align.scalar_head import head_path, scalar_head
from kitout.data.encode.item import EncodedPair, EncodedPrompt, EncodedUnpaired
from kitout.train.loop.step import StepRunner
from kitout.train.metrics_log import MetricsLog
from train.fixtures import add, job, kit_of, no_sync, texts
from zoo import ZOO, tokenizer_of

METHODS = {
    "LoRA": LoRA(rank=2, targets="all-linear"),
    "prompt": PromptTuning(length=4),
    "prefix": PrefixTuning(length=3),
    "Houlsby": Houlsby(width=6),
}
PROMPTS = [(7, 8, 9), (5, 6), (10, 11, 17, 5, 22, 33, 4), tuple(range(5, 45))]


class SumOfIds:
    """A reward that differs between the answers to a prompt."""

    name = "ids"

    def score(self, answers: AnswerBatch) -> Sequence[float | None]:
        return [float(sum(row.input_ids)) for row in answers.encoded]


def twins(method: str) -> Kit:
    """A policy and a reference with the same values."""
    kit = kit_of("llama")
    for name in ("policy", "reference"):
        add(kit, name, METHODS[method], seed=3)
    kit["reference"].requires_grad_(False)
    return kit


def step(kit: Kit, objective: Any, items: Sequence[Any], micro: int) -> tuple[float, dict[str, float]]:
    """The loss and the metrics of a first step."""
    kit["policy"].zero_grad()
    runner = StepRunner(kit, [job("policy", objective, items, steps=1, batch=len(items))], micro)
    loss = runner.step(kit, [(0, i) for i in range(len(items))], 0, torch.Tensor.backward, no_sync)
    return loss.item(), runner.pop_metrics()


LOSSES = {"grpo": GRPOLoss(iterations=2, beta=0.04), "rloo": RLOOLoss(), "ppo": PPOLoss()}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_the_first_ratio_is_one(method: str, kind: str, tmp_path: Path) -> None:
    """The mean ratio is within 1e-6; one token of few roundings of its float32 log-probability, which are 1e-6 too."""
    kit, loss = twins(method), LOSSES[kind]
    who = Roles("policy", "reference", "value" if kind == "ppo" else None)
    if who.value is not None:
        add(kit, who.value, METHODS[method], {head_path(kit): scalar_head(kit, 2)}, seed=4)
    prompts = [EncodedPrompt(ids, "", {}, f"line {i}") for i, ids in enumerate(PROMPTS)]
    plan = RoundPlan.of([[0, 1, 2, 3]], 4, 2 if kind == "grpo" else 1, 1, None, 0)
    rounds = Rounds(
        kit, tokenizer_of(ZOO["llama"]), who, prompts, plan, loss, SamplingSettings(max_new_tokens=9),
        WeightedRewards((SumOfIds(),), (1.0,)), 0, MetricsLog(tmp_path / "completions.jsonl"),
    )  # fmt: skip
    kit.base.train()
    modes, random_state = [module.training for module in kit.modules()], torch.get_rng_state()
    rounds.before_step(0)
    assert [module.training for module in kit.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    kit.base.eval()
    answers: list[SampledAnswer] = rounds.answers
    assert len({one.length for one in answers}) > 3
    assert abs(rounds.last.get("kl_to_reference", 0.0)) <= 1e-5  # summed over whole answers
    objective = PolicyObjective(kit, loss, 9)
    with kit.use("policy"):
        objective.choose_head_loss(["policy"], prompts)
        for size in (16, 5, 1):
            for some in (answers[start : start + size] for start in range(0, 16, size)):
                log_probs, _ = objective.scorer(kit, objective.collate(some, None))
                for name in ("old", "reference"):
                    kept = [value for one in some if (value := getattr(one, name)) is not None]
                    ratios = (log_probs - torch.cat(kept)).exp() if kept else torch.ones(1)
                    rounding = 4 * torch.finfo(torch.float32).eps * log_probs.abs().max()
                    assert (ratios - 1).abs().max() <= max(1e-6, rounding), (name, size)
    for micro in (16, 5):
        _, metrics = step(kit, objective, answers, micro)
        assert abs(metrics["ratio"] - 1) <= 1e-6
        assert metrics["clip_fraction"] == 0
        assert 0 <= metrics.get("kl", 0.0) <= 1e-6


def test_prompts_of_one_token_can_be_answered() -> None:
    objective = PolicyObjective(twins(next(iter(METHODS))), GRPOLoss(), 9)
    with objective.kit.use("policy"):
        objective.choose_head_loss(["policy"], [EncodedPrompt((i,), "") for i in (7, 8)])
    assert objective.scorer.head.mode != "full"


@pytest.mark.parametrize("method", METHODS)
def test_the_first_margin_is_zero(method: str, tmp_path: Path) -> None:
    kit = twins(method)
    rows, others = texts(9, seed=1, low=6, high=40), texts(9, seed=2, low=6, high=40)
    pairs = [EncodedPair(one, other) for one, other in zip(rows, others, strict=True)]
    judged = [EncodedUnpaired(row, i % 2 == 0) for i, row in enumerate(rows)]
    dpo, kto = PreferenceObjective(kit, DPOLoss()), KTOObjective(kit, KTOLoss())
    kto.mismatched = mismatched_rows(judged, 200)
    with kit.use("policy"):
        dpo.choose_head_loss(["policy"], pairs)
        kto.choose_head_loss(["policy"], judged)
    everything = [*rows, *others, *kto.mismatched.values()]
    random_state = torch.get_rng_state()
    dpo.reference = kto.reference = reference_scores(kit, dpo.scorer, everything, "reference", tmp_path, "key")
    assert torch.equal(torch.get_rng_state(), random_state)
    for micro in (9, 2):
        loss, metrics = step(kit, dpo, pairs, micro)
        assert loss == pytest.approx(math.log(2), abs=1e-6)
        assert all(abs(metrics[name]) <= 1e-6 for name in ("chosen_reward", "rejected_reward", "margin"))
        loss, metrics = step(kit, kto, judged, micro)
        assert loss == pytest.approx(0.5, abs=1e-6)
        assert all(abs(metrics[name]) <= 1e-6 for name in ("chosen_reward", "rejected_reward", "margin", "kl"))
