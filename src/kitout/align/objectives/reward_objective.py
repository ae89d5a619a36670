"""A reward model: a scalar head on the frozen base and an adapter, trained so that chosen answers score higher.

Bradley-Terry over pairs; the score is the head's value at an answer's last token. It knows pairs and scores; the
formula is `kitout.align.losses.preference`'s, the head `kitout.align.scalar_head`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kitout.align.config.losses import RewardLoss
from kitout.align.losses.preference import chosen_and_rejected, reward_loss
from kitout.align.scalar_head import last_scalars
from kitout.data.encode.item import EncodedPair
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.answer_rows import collate_rows
from kitout.train.objectives.objective import Batch, Losses


class RewardObjective:
    """One number for an answer, higher for the better of two."""

    task: Task = "pairs"
    rows: int = 2

    def __init__(self, kit: Kit, loss: RewardLoss) -> None:
        self.kit, self.loss = kit, loss

    @property
    def batch_key(self) -> Hashable:
        return type(self).__name__, self.loss.model_dump_json()

    def num_tokens(self, item: EncodedPair) -> int:
        return 2 * max(item.chosen.length, item.rejected.length)

    def num_targets(self, item: EncodedPair) -> int:
        return 1

    def collate(self, items: Sequence[EncodedPair], seeds: Sequence[int] | None) -> Batch:
        batch = collate_rows([row for pair in items for row in (pair.chosen, pair.rejected)], self.kit.device)
        margins = torch.tensor([pair.margin for pair in items], dtype=torch.float32, device=self.kit.device)
        return replace(batch, targets={"margins": margins}, num_examples=len(items))

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        chosen, rejected = self._scores(model, batch)
        margins = batch.targets["margins"]
        losses, metrics = reward_loss(chosen, rejected, margins, centering=self.loss.centering)
        ones = torch.ones_like(losses)
        rewards = torch.stack((chosen, rejected), dim=1).detach()
        return Losses(
            (weights * losses).sum(), losses.detach(), metrics["accuracy"], ones, metrics=metrics, rewards=rewards
        )

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        """(score of the chosen answer, score of the rejected one) of each pair."""
        chosen, rejected = self._scores(model, batch)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    def _scores(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        scores = last_scalars(lambda: model(**batch.inputs), self.kit, batch.inputs["attention_mask"])
        return chosen_and_rejected(scores)
