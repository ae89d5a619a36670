"""Answers and their log-probabilities: what preference losses, KTO and reinforcement have in common.

A row is a prompt with its answer; the answer's tokens, its end token included, are scored. A reference's
log-probabilities are computed once, without gradient, and kept by row (`kitout.align.reference`). It knows rows and the
output head, and no loss and no reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kitout.data.encode.item import EncodedExample
from kitout.errors import ConfigError
from kitout.kit import Kit
from kitout.train.objectives.answer_rows import collate_rows
from kitout.train.objectives.lm_head_loss import HeadLoss
from kitout.train.objectives.objective import Batch

ReferenceScores: TypeAlias = Mapping[EncodedExample, Tensor]  # row -> float32 log-probability of each answer token


class AnswerScorer:
    """`scorer(model, batch)` gives the log-probability and the entropy at every token of the answers."""

    head: HeadLoss
    """How they are taken; over all logits until `choose` has found a cheaper way."""
    temperature: float
    """Logits are divided by it, as they are when answers are sampled."""

    def __init__(self, kit: Kit, temperature: float = 1.0) -> None:
        self.kit, self.temperature = kit, temperature
        self.head = HeadLoss(kit, "full")

    def choose(self, names: Sequence[str], rows: Sequence[EncodedExample]) -> None:
        """Finds the cheapest exact way on a few rows, under the active route. names: adapters that are to be scored."""
        few = sorted((row for row in rows if row.num_targets), key=lambda row: row.length)[:2]
        if not few:
            raise ConfigError(f"none of the first {len(rows)} answers has a token: look at the data")
        batch = self.collate(few)
        run_model = lambda: self.kit(**batch.inputs)  # noqa: E731
        positions, labels = batch.targets["positions"], batch.targets["labels"]
        self.head = HeadLoss.choose(self.kit, list(names), run_model, positions, labels, log_probs=True)

    def collate(self, rows: Sequence[EncodedExample], reference: ReferenceScores | None = None) -> Batch:
        """Rows as one batch. reference: adds a target of that name, [N]."""
        batch = collate_rows(rows, self.kit.device)
        if reference is not None:
            batch.targets["reference"] = torch.cat([reference[row] for row in rows]).to(self.kit.device)
        return batch

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """([N] log-probabilities with gradient, [N] entropies in nats without)."""
        positions, labels = batch.targets["positions"], batch.targets["labels"]
        return self.head.log_probs(lambda: model(**batch.inputs), positions, labels, self.temperature)
