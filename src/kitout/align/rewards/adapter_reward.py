"""A reward model as a source of rewards: an adapter with a scalar head on the same base, read at each answer's end.

It knows a kit and the adapter's name on it, and not how it was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kitout.align.rewards.reward import AnswerBatch
from kitout.align.roles import roles
from kitout.kit import Kit
from kitout.train.measure.predict import plan_lengths
from kitout.train.objectives.answer_rows import collate_rows


@dataclass(frozen=True)
class AdapterReward:
    """One number for a prompt with its answer."""

    name: str
    """In messages, logs and files."""
    kit: Kit
    """Whose base it is on."""
    adapter: str
    """Its name there."""

    def score(self, answers: AnswerBatch) -> Sequence[float | None]:
        """The head's value at the last token of each answer."""
        found: dict[int, float] = {}
        for indices in plan_lengths([row.length for row in answers.encoded]):
            batch = collate_rows([answers.encoded[i] for i in indices], self.kit.device)
            scores = roles(self.kit, batch, {self.adapter: "last"})[self.adapter]
            found |= zip(indices, scores.tolist(), strict=True)
        return [found[i] for i in range(len(answers))]
