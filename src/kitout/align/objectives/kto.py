"""KTO: single answers, each desirable or not, against how far the policy is from its reference.

That distance, z, is the mean log-ratio of answers to other prompts over the whole step, taken before its first
micro-batch: so neither size nor order of micro-batches changes a loss. Each example has one fixed partner whose answer
is put behind its prompt (`mismatched_rows`), so the reference scores that once as well. It knows answers and
log-probabilities; the formula is `kitout.align.losses.preference`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kitout.align.config.losses import KTOLoss
from kitout.align.losses.preference import kto_loss, kto_reference_point, sequence_log_ratios
from kitout.align.objectives.scored_answers import AnswerScorer, ReferenceScores
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample, EncodedUnpaired, without_first_target
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.measure.predict import plan_lengths
from kitout.train.objectives.objective import Batch, Losses


class KTOObjective:
    """Desirable answers become likelier than the reference makes them, undesirable ones less likely."""

    task: Task = "pairs"
    rows: int = 1
    reference: ReferenceScores
    """Of every answer, and of every mismatched row."""
    mismatched: Mapping[EncodedExample, EncodedExample]
    """Answer -> its prompt with another example's answer."""
    z: float
    """Of the step in progress, or of what is evaluated."""

    def __init__(self, kit: Kit, loss: KTOLoss) -> None:
        self.kit, self.loss = kit, loss
        self.scorer = AnswerScorer(kit)
        self.reference, self.mismatched, self.z = {}, {}, 0.0

    def choose_head_loss(self, names: Sequence[str], items: Sequence[EncodedUnpaired]) -> None:
        self.scorer.choose(names, [item.answer for item in items])

    @property
    def batch_key(self) -> Hashable:
        """None: each job has a z of its own."""
        return None

    def num_tokens(self, item: EncodedUnpaired) -> int:
        return item.answer.length

    def num_targets(self, item: EncodedUnpaired) -> int:
        return 1

    def collate(self, items: Sequence[EncodedUnpaired], seeds: Sequence[int] | None) -> Batch:
        batch = self.scorer.collate([item.answer for item in items], self.reference)
        batch.targets["is_desirable"] = torch.tensor([item.is_desirable for item in items], device=self.kit.device)
        return batch

    def before_step(self, model: Any, items: Sequence[EncodedUnpaired], step: int) -> None:
        """Takes z over all items of the step."""
        self.z = self._reference_point(model, items)

    @contextmanager
    def reference_point_of(self, model: Any, items: Sequence[EncodedUnpaired]) -> Iterator[None]:
        """Inside, losses are those of these items alone: with their own z, as of a validation split."""
        of_step = self.z
        with torch.no_grad():
            self.z = self._reference_point(model, items)
        try:
            yield
        finally:
            self.z = of_step

    def _reference_point(self, model: Any, items: Sequence[EncodedUnpaired]) -> float:
        rows = [self.mismatched[item.answer] for item in items if item.answer in self.mismatched]
        ratios = [
            self._log_ratios(model, [rows[i] for i in some]) for some in plan_lengths([row.length for row in rows])
        ]
        return kto_reference_point(torch.cat(ratios)).item() if ratios else 0.0

    def _log_ratios(self, model: Any, rows: Sequence[EncodedExample]) -> Tensor:
        batch = self.scorer.collate(rows, self.reference)
        log_probs, _ = self.scorer(model, batch)
        return sequence_log_ratios(log_probs, batch.targets["reference"], batch.targets["owners"], len(rows))

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        losses, metrics = self._losses_of_answers(model, batch)
        ones = torch.ones_like(losses)
        chosen, rejected = metrics["chosen_reward"], metrics["rejected_reward"]
        rewards = torch.where(chosen.isnan(), rejected, chosen)
        return Losses(
            (weights * losses).sum(), losses.detach(), metrics["accuracy"], ones, metrics=metrics, rewards=rewards
        )

    def _losses_of_answers(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, _ = self.scorer(model, batch)
        owners, loss = batch.targets["owners"], self.loss
        ratios = sequence_log_ratios(log_probs, batch.targets["reference"], owners, batch.num_examples)
        return kto_loss(
            ratios, batch.targets["is_desirable"], self.z, beta=loss.beta, desirable_weight=loss.desirable_weight,
            undesirable_weight=loss.undesirable_weight,
        )  # fmt: skip

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        """The reward of each answer, beta times its log-ratio."""
        rewards = self.losses(model, batch, torch.ones(batch.num_examples, device=self.kit.device)).rewards
        assert rewards is not None, "set there"
        return list(rewards.tolist())


def mismatched_rows(items: Sequence[EncodedUnpaired], max_length: int) -> dict[EncodedExample, EncodedExample]:
    """Each answer's prompt with the answer of the next example that has another prompt; too long ones are left out."""
    rows: dict[EncodedExample, EncodedExample] = {}
    answers = [item.answer for item in items]
    prompts = [row.input_ids[: row.prompt_length] for row in answers]
    following = len(answers) + next((i for i, prompt in enumerate(prompts) if prompt != prompts[-1]), 0)
    partners = [0] * len(answers)  # from the back, so that a thousand answers to one prompt look no further than one
    for i in reversed(range(len(answers))):
        following = i + 1 if i + 1 < len(answers) and prompts[i + 1] != prompts[i] else following
        partners[i] = following % len(answers)
    for row, prompt, partner in zip(answers, prompts, partners, strict=True):
        if prompts[partner] == prompt:  # the only one
            continue
        other = answers[partner]
        answer = other.input_ids[other.prompt_length :]
        ids = prompt + answer
        if len(ids) <= max_length:
            labels = without_first_target((IGNORE_INDEX,) * len(prompt) + answer)
            rows[row] = replace(row, input_ids=ids, labels=labels, reference=other.reference)
    return rows
