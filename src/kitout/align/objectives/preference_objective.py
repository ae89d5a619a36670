"""Losses over pairs of answers by their log-probabilities: DPO and its variants, ORPO, SimPO.

A pair is two rows of the batch, the chosen answer before the rejected one, and is never cut. It knows pairs and
log-probabilities; the formulas are `kitout.align.losses.preference`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kitout.align.config.losses import DPOLoss, ORPOLoss, SimPOLoss
from kitout.align.losses.preference import (
    chosen_and_rejected,
    dpo_loss,
    orpo_loss,
    sequence_log_ratios,
    simpo_loss,
)
from kitout.align.objectives.scored_answers import AnswerScorer, ReferenceScores
from kitout.data.by_row import count_by_row, mean_by_row
from kitout.data.encode.item import EncodedPair
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.objective import Batch, Losses


class PreferenceObjective:
    """The answer that was chosen is to become likelier than the one that was rejected."""

    task: Task = "pairs"
    rows: int = 2
    reference: ReferenceScores | None
    """Of both answers of every pair; None: the loss has none."""

    def __init__(self, kit: Kit, loss: DPOLoss | ORPOLoss | SimPOLoss) -> None:
        self.kit, self.loss = kit, loss
        self.scorer = AnswerScorer(kit)
        self.reference = None

    def choose_head_loss(self, names: Sequence[str], items: Sequence[EncodedPair]) -> None:
        self.scorer.choose(names, [row for pair in items for row in (pair.chosen, pair.rejected)])

    @property
    def batch_key(self) -> Hashable:
        return type(self).__name__, self.loss.model_dump_json(), self.scorer.head.mode, id(self.reference)

    def num_tokens(self, item: EncodedPair) -> int:
        return 2 * max(item.chosen.length, item.rejected.length)

    def num_targets(self, item: EncodedPair) -> int:
        return 1

    def collate(self, items: Sequence[EncodedPair], seeds: Sequence[int] | None) -> Batch:
        rows = [row for pair in items for row in (pair.chosen, pair.rejected)]
        return replace(self.scorer.collate(rows, self.reference), num_examples=len(items))

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        log_probs, _ = self.scorer(model, batch)
        losses, metrics = self._losses_of_pairs(log_probs, batch)
        ones = torch.ones_like(losses)
        rewards = torch.stack((metrics["chosen_reward"], metrics["rejected_reward"]), dim=1)
        return Losses(
            (weights * losses).sum(), losses.detach(), metrics["accuracy"], ones, metrics=metrics, rewards=rewards
        )

    def _losses_of_pairs(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        owners, num_rows, loss = batch.targets["owners"], 2 * batch.num_examples, self.loss
        if isinstance(loss, DPOLoss):
            ratios = sequence_log_ratios(log_probs, batch.targets["reference"], owners, num_rows)
            lengths = chosen_and_rejected(count_by_row(owners, num_rows))
            return dpo_loss(
                *chosen_and_rejected(ratios), loss.variant, beta=loss.beta, label_smoothing=loss.label_smoothing,
                lengths=lengths,
            )  # fmt: skip
        means = chosen_and_rejected(mean_by_row(log_probs, owners, num_rows))
        if isinstance(loss, ORPOLoss):
            return orpo_loss(*means, beta=loss.beta)
        return simpo_loss(*means, beta=loss.beta, gamma=loss.gamma, cpo_alpha=loss.cpo_alpha)

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        """[reward of the chosen answer, reward of the rejected one] of each pair, as the loss has them."""
        rewards = self.losses(model, batch, torch.ones(batch.num_examples, device=self.kit.device)).rewards
        assert rewards is not None, "set there"
        return list(rewards.tolist())
