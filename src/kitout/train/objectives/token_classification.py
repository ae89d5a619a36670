"""One class per token: names, parts of speech; the first piece of a word carries its class, the others are ignored.

Cross-entropy over the marked tokens. It knows items and a model's call, no words and no adapter.
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
    """filler: the tokenizer's padding id."""

    task: Task = "tokens"

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
        gold = torch.full(ids.shape, IGNORE_INDEX)
        for i, item in enumerate(items):
            gold[i, : len(item.labels)] = torch.tensor(item.labels)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return Batch(inputs, {"labels": gold.to(self.kit.device)}, len(items), int(mask.sum()), ids.numel())

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        gold = batch.targets["labels"]
        logits = at_least_float32(model(**batch.inputs).logits)
        nll = F.cross_entropy(logits.transpose(1, 2), gold, ignore_index=IGNORE_INDEX, reduction="none")
        there = gold != IGNORE_INDEX
        right = (logits.argmax(2) == gold) & there
        rows = nll.sum(1)
        return Losses((weights * rows).sum(), rows.detach(), right.sum(1).float(), there.sum(1).float())

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        best = model(**batch.inputs).logits.argmax(2)
        return [row[there].tolist() for row, there in zip(best, batch.targets["labels"] != IGNORE_INDEX, strict=True)]
