"""The policy of reinforcement: sampled answers and their advantages; GRPO and its variants, RLOO, PPO.

Answers, advantages and old log-probabilities are made by the rollouts (`kitout.align.rounds`), before the steps that
train on them. Where a round has one step the policy is still what wrote the answers, and its ratio is 1 by
construction. It knows scored answers, and no reward; the formulas are `kitout.align.losses.reinforcement`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kitout.align.config.losses import GRPOLoss, PPOLoss, RLOOLoss
from kitout.align.losses import reinforcement
from kitout.align.objectives.scored_answers import AnswerScorer
from kitout.data.encode.item import EncodedExample, EncodedPrompt
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.objective import Batch, Losses


@dataclass(frozen=True, eq=False)
class SampledAnswer:
    """One sampled answer as it is trained on; tensors are float32, [T] by token of the answer."""

    row: EncodedExample
    """Prompt and answer, labels on the answer."""
    advantages: Tensor
    """[1] of the whole answer, or [T]."""
    old: Tensor | None = None
    """Log-probabilities of the policy that wrote it; None: it is the policy of this step."""
    reference: Tensor | None = None
    """Log-probabilities of the reference; None: there is none."""
    values: Tensor | None = None
    """What the value adapter expected before each token (PPO)."""
    returns: Tensor | None = None
    """What came (PPO)."""

    @property
    def location(self) -> str:
        """For messages."""
        return self.row.location

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return self.row.length


class PolicyObjective:
    """Answers with a positive advantage become likelier, those with a negative one less likely."""

    task: Task = "pairs"
    rows: int = 1

    def __init__(
        self, kit: Kit, loss: GRPOLoss | RLOOLoss | PPOLoss, max_new_tokens: int, temperature: float = 1.0
    ) -> None:
        self.kit, self.loss, self.max_new_tokens = kit, loss, max_new_tokens
        self.scorer = AnswerScorer(kit, temperature, may_share=True)

    def choose_head_loss(self, names: Sequence[str], items: Sequence[EncodedPrompt]) -> None:
        """On prompts, as there are no answers yet: its own last token behind each is as good as one."""
        texts = [(*item.input_ids, item.input_ids[-1]) for item in items]  # a prompt may have one token alone
        self.scorer.choose(names, [EncodedExample(ids, ids) for ids in texts])

    @property
    def batch_key(self) -> Hashable:
        """None: what it trains on is its own."""
        return None

    def num_tokens(self, item: SampledAnswer) -> int:
        return item.length

    def num_targets(self, item: SampledAnswer) -> int:
        kind = "rloo" if isinstance(self.loss, RLOOLoss) else "ppo"
        return reinforcement.num_targets(
            self.loss.variant if isinstance(self.loss, GRPOLoss) else kind,  # type: ignore[arg-type]
            item.row.num_targets, self.max_new_tokens,
        )  # fmt: skip

    def collate(self, items: Sequence[SampledAnswer], seeds: Sequence[int] | None) -> Batch:
        batch = self.scorer.collate([item.row for item in items])
        for name in ("advantages", "old", "reference"):
            values = [getattr(item, name) for item in items]
            if all(value is not None for value in values):
                batch.targets[name] = torch.cat(values).to(self.kit.device)
        return batch

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        log_probs, entropy = self.scorer(model, batch)
        owners, num_rows, loss = batch.targets["owners"], batch.num_examples, self.loss
        old, reference = batch.targets.get("old", log_probs.detach()), batch.targets.get("reference")
        advantages = batch.targets["advantages"]
        how: dict[str, Any] = {"clip": loss.clip, "entropy": entropy}
        given = (log_probs, old, advantages, owners, num_rows)
        if isinstance(loss, GRPOLoss):
            losses, metrics = reinforcement.grpo_loss(
                *given, loss.variant, clip_high=loss.clip_high, reference=reference, beta=loss.beta, **how
            )
        else:
            function = reinforcement.rloo_loss if isinstance(loss, RLOOLoss) else reinforcement.ppo_policy_loss
            losses, metrics = function(*given, **how)
        targets = torch.bincount(owners, minlength=num_rows).to(losses.dtype)
        return Losses((weights * losses).sum(), losses.detach(), torch.zeros_like(losses), targets, metrics=metrics)

    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return []  # answers are sampled: kitout.align.rollout
