"""One class per token, as for named entities or parts of speech.

The first token of a word has its class, the others are ignored. Cross-entropy over the tokens with a class. It knows
encoded examples and a model's call, no words and no adapter.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.padding import pad
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.objective import Batch, Losses


class TokenClassification:
    """A class for the first token of each word."""

    task: Task = "tokens"
    rows: int = 1
    pad_token_id: int
    """The tokenizer's."""

    def __init__(self, kit: Kit, pad_token_id: int) -> None:
        self.kit, self.pad_token_id = kit, pad_token_id

    @property
    def batch_key(self) -> Hashable:
        return self.task, self.pad_token_id

    def num_tokens(self, item: EncodedExample) -> int:
        return len(item.input_ids)

    def num_targets(self, item: EncodedExample) -> int:
        return item.num_targets

    def collate(self, items: Sequence[EncodedExample], seeds: Sequence[int] | None) -> Batch:
        ids, mask = pad([item.input_ids for item in items], self.pad_token_id, "right", self.kit.device)
        labels = torch.full(ids.shape, IGNORE_INDEX)
        for i, item in enumerate(items):
            labels[i, : len(item.labels)] = torch.tensor(item.labels)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return Batch(inputs, {"labels": labels.to(self.kit.device)}, len(items), int(mask.sum()), ids.numel())

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        labels = batch.targets["labels"]
        logits = at_least_float32(self.logits(model, batch))
        nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
        is_target = labels != IGNORE_INDEX
        is_correct = (logits.argmax(2) == labels) & is_target
        losses = nll.sum(1)
        total = (weights * losses).sum()
        return Losses(total, losses.detach(), is_correct.sum(1).float(), is_target.sum(1).float())

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        classes = self.logits(model, batch).argmax(2)
        is_target = batch.targets["labels"] != IGNORE_INDEX
        return [row[mask].tolist() for row, mask in zip(classes, is_target, strict=True)]

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """[B, T, C]."""
        logits: Tensor = model(**batch.inputs).logits
        return logits
