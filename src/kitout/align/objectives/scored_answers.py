"""Answers and their log-probabilities: what preference losses, KTO and reinforcement have in common.

A row is a prompt with its answer; the answer's tokens, its end token included, are scored. A reference's
log-probabilities are computed once, without gradient, and kept by row (`kitout.align.reference`). It knows rows and the
output head, and no loss and no reward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kitout.align.objectives.shared_prompts import SharedPrompts
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.errors import ConfigError
from kitout.evaluate.ask.text_limit import has_virtual_tokens
from kitout.kit import Kit
from kitout.train.objectives.answer_rows import collate_rows
from kitout.train.objectives.lm_head_loss import TOLERANCE, HeadLoss, check_causal
from kitout.train.objectives.objective import Batch

ReferenceScores: TypeAlias = Mapping[EncodedExample, Tensor]  # row -> float32 log-probability of each answer token


@dataclass(frozen=True)
class SharedBatch(Batch):
    """Rows of answers, also as prompts and what follows them."""

    shared: SharedPrompts | None = None
    """None: every row by itself."""


class AnswerScorer:
    """`scorer(model, batch)` gives the log-probability and the entropy at every token of the answers.

    may_share: a prompt of several rows runs once, where that was found to give the same (`choose`).
    """

    head: HeadLoss
    """How they are taken; over all logits until `choose` has found a cheaper way."""
    temperature: float
    """Logits are divided by it, as they are when answers are sampled."""

    shares_prompts: bool
    """Whether rows of the same prompt share it."""

    def __init__(self, kit: Kit, temperature: float = 1.0, may_share: bool = False) -> None:
        self.kit, self.temperature, self.may_share, self.shares_prompts = kit, temperature, may_share, False
        self.head = HeadLoss(kit, "full")

    def choose(self, names: Sequence[str], rows: Sequence[EncodedExample]) -> None:
        """Finds the cheapest exact way on a few rows, under the active route. names: adapters that are to be scored.

        ConfigError for an encoder.
        """
        check_causal(self.kit)
        few = sorted((row for row in rows if row.num_targets), key=lambda row: row.length)[:2]
        if not few:
            raise ConfigError(f"none of the first {len(rows)} answers has a token: look at the data")
        batch = self.collate(few)
        run_model = lambda: self.kit(**batch.inputs)  # noqa: E731
        positions, labels = batch.targets["positions"], batch.targets["labels"]
        self.head = HeadLoss.choose(self.kit, list(names), run_model, positions, labels, log_probs=True)
        self.shares_prompts = self.may_share and self._can_share(max(few, key=lambda row: row.length).input_ids)

    @torch.no_grad()
    def _can_share(self, ids: Sequence[int]) -> bool:
        """Whether two answers to one prompt get the same from a prompt that runs once; tried on these ids."""
        forward = inspect.signature(self.kit.base.forward).parameters
        if self.head.head is None or "position_ids" not in forward or has_virtual_tokens(self.kit):
            return False
        ids = (tuple(ids) * 8)[: max(8, len(ids))]  # a prompt may be a word
        prompt, answer = ids[: len(ids) - 3], ids[-3:]
        rows = [
            EncodedExample(
                (*prompt, *each), (*(IGNORE_INDEX for _ in prompt), *each), prompt_length=len(prompt)
            )
            for each in (answer, answer[:1:-1])
        ]  # fmt: skip
        batch = self.collate(rows)
        shared = SharedPrompts.of(rows, self.kit.device)
        if shared is None:
            return False
        expected, _ = self(self.kit, batch)
        try:
            found = shared.log_probs(self.head, self.kit, batch.targets["labels"], self.temperature)
        except (RuntimeError, ValueError, TypeError, IndexError):  # a model that goes on from no cache
            return False
        tolerance = TOLERANCE.get(self.kit.dtype, 1e-4) * (1 + expected.abs().mean().item())
        return found is not None and (found[0] - expected).abs().mean().item() <= tolerance

    def collate(self, rows: Sequence[EncodedExample], reference: ReferenceScores | None = None) -> SharedBatch:
        """Rows as one batch. reference: adds a target of that name, [N]."""
        batch = collate_rows(rows, self.kit.device)
        if reference is not None:
            batch.targets["reference"] = torch.cat([reference[row] for row in rows]).to(self.kit.device)
        shared = SharedPrompts.of(rows, self.kit.device) if self.shares_prompts else None
        return SharedBatch(**batch.__dict__, shared=shared)

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """([N] log-probabilities with gradient, [N] entropies in nats without)."""
        positions, labels = batch.targets["positions"], batch.targets["labels"]
        if isinstance(batch, SharedBatch) and batch.shared is not None:
            found = batch.shared.log_probs(self.head, model, labels, self.temperature)
            if found is not None:
                return found
        return self.head.log_probs(lambda: model(**batch.inputs), positions, labels, self.temperature)
