"""Objectives whose examples are two rows: a preference, and one whose loss needs a number of the whole step.

What tests of the loop need, in one process and in several. It knows the loop's public names.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kitout import Kit
from kitout.data.by_row import sum_by_row
from kitout.data.encode.item import EncodedExample
from kitout.evaluate.metrics.registry import Task
from kitout.train.loop.jobs import Job
from kitout.train.objectives.answer_rows import collate_rows
from kitout.train.objectives.lm_head_loss import HeadLoss
from kitout.train.objectives.objective import Batch, Losses
from train.fixtures import job, texts

Pair = tuple[EncodedExample, EncodedExample]


class Pairs:
    """A preference without a reference."""

    task: Task = "generation"
    rows = 2

    def __init__(self, kit: Kit, scale: float = 1.0) -> None:
        self.kit, self.scale = kit, scale
        self.head = HeadLoss(kit, "chunked")
        self.num_rows: list[int] = []

    @property
    def batch_key(self) -> Hashable:
        return "pairs", self.scale

    def num_tokens(self, item: Pair) -> int:
        return sum(len(row.input_ids) for row in item)

    def num_targets(self, item: Pair) -> int:
        return 1

    def collate(self, items: Sequence[Pair], seeds: Sequence[int] | None) -> Batch:
        assert seeds is None or len(seeds) == len(items)
        self.num_rows.append(2 * len(items))
        return collate_rows([row for item in items for row in item], self.kit.device)

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        positions, labels, owners = (batch.targets[name] for name in ("positions", "labels", "owners"))
        log_probs, entropy = self.head.log_probs(lambda: model(**batch.inputs), positions, labels)
        sums = sum_by_row(log_probs, owners, batch.num_examples)
        margins = sums[::2] - sums[1::2]
        losses = F.softplus(-self.scale * margins)
        means = sum_by_row(entropy, owners, batch.num_examples)[::2]
        wins = torch.where(margins > 0, margins, torch.nan).detach()  # of some examples only
        metrics = {"margin": margins.detach(), "chosen_entropy": means, "wins": wins}
        ones = torch.ones_like(losses)
        return Losses((weights * losses).sum(), losses.detach(), (margins > 0).float(), ones, metrics=metrics)

    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return []


class PairsWithBaseline(Pairs):
    """Its loss needs a number of the whole step, as KTO's does."""

    def __init__(self, kit: Kit) -> None:
        super().__init__(kit)
        self.calls: list[tuple[int, int, float]] = []
        self.baseline = 0.0

    def before_step(self, model: Any, items: Sequence[Pair], step: int) -> None:
        assert not torch.is_grad_enabled()
        losses = Pairs.losses(self, model, self.collate(items, None), torch.ones(len(items)))
        self.baseline = losses.per_example.mean().item() + torch.rand(()).item()
        self.calls.append((step, len(items), self.baseline))

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        losses = super().losses(model, batch, weights)
        return replace(losses, total=losses.total * self.baseline)


def pairs(number: int, seed: int = 0) -> list[Pair]:
    return list(zip(texts(number, seed), texts(number, seed + 1), strict=True))


def pair_job(kit: Kit, name: str, objective: Pairs | None = None, seed: int = 0, **settings: Any) -> Job:
    return job(name, objective or Pairs(kit), pairs(7, seed), **{"steps": 1, "batch": 7, **settings})
