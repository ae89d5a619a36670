"""Neither the cut of a step into micro-batches nor the order of its examples changes its loss or a gradient."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kitout import IA3, Kit, LoRA, PrefixTuning
from kitout.align.config.losses import (
    DPOLoss,
    GRPOLoss,
    KTOLoss,
    ORPOLoss,
    PPOLoss,
    RewardLoss,
    RLOOLoss,
    SimPOLoss,
)
from kitout.align.objectives.kto import KTOObjective, mismatched_rows
from kitout.align.objectives.policy import PolicyObjective, SampledAnswer
from kitout.align.objectives.preference_objective import PreferenceObjective
from kitout.align.objectives.reward_objective import RewardObjective
from kitout.align.objectives.value import ValueObjective
from kitout.align.scalar_head import head_path, scalar_head
from kitout.data.encode.item import EncodedExample, EncodedPair, EncodedUnpaired
from kitout.train.loop.jobs import Job
from kitout.train.loop.step import StepRunner
from train.fixtures import add, far, grads_of, job, kit_of, no_sync, texts

METHODS = {"LoRA": LoRA(rank=2, targets="all-linear"), "prefix": PrefixTuning(length=3), "IA3": IA3()}
ROWS, OTHERS = texts(7, seed=3), texts(7, seed=8)
MAX_NEW = 12
Build = Callable[[Kit], tuple[Any, Sequence[Any]]]


def reference(rows: Sequence[EncodedExample]) -> dict[EncodedExample, Tensor]:
    """Near what a fresh model says of tokens."""
    generator = torch.Generator().manual_seed(5)
    return {row: -4.0 - torch.rand(row.num_targets, generator=generator) for row in rows}


def pairs(kit: Kit, objective: Any) -> tuple[Any, Sequence[Any]]:
    if not isinstance(objective, RewardObjective):
        objective.reference = reference([*ROWS, *OTHERS])
    items = [EncodedPair(one, other, margin=0.1 * i) for i, (one, other) in enumerate(zip(ROWS, OTHERS, strict=True))]
    return objective, items


def judged(kit: Kit, objective: KTOObjective) -> tuple[Any, Sequence[Any]]:
    items = [EncodedUnpaired(row, is_desirable=i % 3 > 0) for i, row in enumerate(ROWS)]
    objective.mismatched = mismatched_rows(items, 40)
    objective.reference = reference([*ROWS, *objective.mismatched.values()])
    return objective, items


def sampled(kit: Kit, objective: Any) -> tuple[Any, Sequence[Any]]:
    """Answers that an earlier policy wrote, so that ratios are clipped for some of them."""
    by_token = isinstance(objective.loss, PPOLoss)
    generator = torch.Generator().manual_seed(6)
    items = []
    for row, old in reference(ROWS).items():
        noise = torch.randn(4, len(old), generator=generator)
        weights = noise[0] if by_token else noise[0, :1]
        items.append(SampledAnswer(row, weights, old, old + 0.3 * noise[1], 0.2 * noise[2], noise[3]))
    return objective, items


OBJECTIVES: dict[str, Build] = {
    "reward": lambda kit: pairs(kit, RewardObjective(kit, RewardLoss())),
    "dpo": lambda kit: pairs(kit, PreferenceObjective(kit, DPOLoss(label_smoothing=0.1))),
    "ipo": lambda kit: pairs(kit, PreferenceObjective(kit, DPOLoss(variant="ipo"))),
    "hinge": lambda kit: pairs(kit, PreferenceObjective(kit, DPOLoss(variant="hinge"))),
    "orpo": lambda kit: pairs(kit, PreferenceObjective(kit, ORPOLoss())),
    "simpo": lambda kit: pairs(kit, PreferenceObjective(kit, SimPOLoss(cpo_alpha=0.1))),
    "kto": lambda kit: judged(kit, KTOObjective(kit, KTOLoss())),
    "grpo": lambda kit: sampled(kit, PolicyObjective(kit, GRPOLoss(variant="grpo", beta=0.04), MAX_NEW)),
    "dapo": lambda kit: sampled(kit, PolicyObjective(kit, GRPOLoss(clip_high=0.28), MAX_NEW, temperature=0.7)),
    "dr_grpo": lambda kit: sampled(kit, PolicyObjective(kit, GRPOLoss(variant="dr_grpo"), MAX_NEW)),
    "rloo": lambda kit: sampled(kit, PolicyObjective(kit, RLOOLoss(), MAX_NEW)),
    "ppo": lambda kit: sampled(kit, PolicyObjective(kit, PPOLoss(), MAX_NEW)),
    "value": lambda kit: sampled(kit, ValueObjective(kit, PPOLoss())),
}


def step(kit: Kit, one: Job, micro: int, order: Sequence[int]) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """The loss, the gradients and what is logged of one step over these examples."""
    kit[one.name].zero_grad()
    runner = StepRunner(kit, [one], micro)
    loss = runner.step(kit, [(0, i) for i in order], 0, Tensor.backward, no_sync)
    return loss.item(), grads_of(kit, [one]), {**runner.pop_losses(), **runner.pop_metrics()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_cuts_and_orders_give_one_loss(name: str) -> None:
    """In float64 gradients are equal up to its own rounding; the loss that is returned is float32."""
    for dtype, methods, tolerance in ((torch.float64, METHODS, 1e-12), (torch.float32, ["LoRA"], 3e-6)):
        kit = kit_of("llama", dtype=dtype)
        objective, items = OBJECTIVES[name](kit)
        for method in methods:
            heads = {head_path(kit): scalar_head(kit, 1)} if name in ("reward", "value") else None
            add(kit, method, METHODS[method], heads)
            one = job(method, objective, items, steps=1, batch=len(items))
            order = list(range(len(items)))
            loss, gradients, logged = step(kit, one, len(items), order)
            assert loss != 0
            for micro in (1, 3):
                random.Random(micro).shuffle(order)
                found, others, also_logged = step(kit, one, micro, order)
                assert found == pytest.approx(loss, rel=1e-6), (method, dtype, micro)
                assert far(others, gradients) <= tolerance, (method, dtype, micro)
                assert also_logged == pytest.approx(logged, rel=1e-6, abs=1e-6, nan_ok=True), (method, dtype, micro)
