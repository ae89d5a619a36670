"""What a reward adapter says of answers: one score for an answer, two for a pair. For predictions, not for training.

The score is the scalar head's value at an answer's last token, as the loss of its training reads it
(`kitout.align.objectives`). It knows rows of tokens, and neither texts nor losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kitout.data.encode.item import EncodedAnswers
from kitout.kit import Kit
from kitout.train.objectives.answer_rows import collate_rows
from kitout.train.objectives.objective import Batch
from kitout.train.objectives.scalar_output import last_scalars


class RewardScore:
    """The scores of answers under the active reward adapter."""

    rows: int = 2  # at most

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    def num_tokens(self, item: EncodedAnswers) -> int:
        """Of both answers of a pair, padded."""
        return len(item.rows) * max(row.length for row in item.rows)

    def collate(self, items: Sequence[EncodedAnswers], seeds: Sequence[int] | None) -> Batch:
        """All answers, item by item. Target `counts` [B]: how many an item has."""
        batch = collate_rows([row for item in items for row in item.rows], self.kit.device)
        counts = torch.tensor([len(item.rows) for item in items], device=self.kit.device)
        return replace(batch, targets={"counts": counts}, num_examples=len(items))

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """[B, 2]: the score of each answer; nan where an item has only one."""
        scores = last_scalars(lambda: model(**batch.inputs), self.kit, batch.inputs["attention_mask"])
        counts = batch.targets["counts"]
        is_there = torch.arange(2, device=scores.device)[None] < counts[:, None]
        return scores.new_full((len(counts), 2), torch.nan).masked_scatter(is_there, scores)
