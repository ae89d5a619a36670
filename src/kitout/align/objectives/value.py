"""The value adapter of PPO: a scalar head that says, before each token of an answer, what is still to come.

It is a job of its own beside the policy's, trained in the same steps on the same answers, so it may be of any method
and is clipped by its own norm. It knows returns, and no reward; the formula is `kitout.align.losses.reinforcement`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kitout.align.config.losses import PPOLoss
from kitout.align.losses.reinforcement import num_targets, ppo_value_loss
from kitout.align.objectives.policy import SampledAnswer
from kitout.align.scalar_head import scalars
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.answer_rows import collate_rows
from kitout.train.objectives.objective import Batch, Losses


class ValueObjective:
    """The value of the state before each token comes near what was returned."""

    task: Task = "pairs"
    rows: int = 1

    def __init__(self, kit: Kit, loss: PPOLoss) -> None:
        self.kit, self.loss = kit, loss

    @property
    def batch_key(self) -> Hashable:
        """None: what it trains on is its own."""
        return None

    def num_tokens(self, item: SampledAnswer) -> int:
        return item.length

    def num_targets(self, item: SampledAnswer) -> int:
        return num_targets("ppo", item.row.num_targets, 0)

    def collate(self, items: Sequence[SampledAnswer], seeds: Sequence[int] | None) -> Batch:
        batch = collate_rows([item.row for item in items], self.kit.device)
        for name in ("values", "returns"):
            batch.targets[name] = torch.cat([getattr(item, name) for item in items]).to(self.kit.device)
        return batch

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        owners, num_rows = batch.targets["owners"], batch.num_examples
        values = scalars(lambda: model(**batch.inputs), self.kit).reshape(-1)[batch.targets["positions"]]
        losses, metrics = ppo_value_loss(
            values, batch.targets["values"], batch.targets["returns"], owners, num_rows, clip=self.loss.value_clip
        )
        losses = self.loss.value_coefficient * losses
        targets = torch.bincount(owners, minlength=num_rows).to(losses.dtype)
        return Losses((weights * losses).sum(), losses.detach(), torch.zeros_like(losses), targets, metrics=metrics)

    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return []
