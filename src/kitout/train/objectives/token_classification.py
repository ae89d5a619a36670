"""One class per token: names, parts of speech; the first piece of a word carries its class, the others are ignored.

Cross-entropy over the marked tokens. It knows items and a model's call, no words and no adapter.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kitout.data.encode.item import IGNORED, Item
from kitout.data.padding import pad
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.batch import Batch
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.objective import Losses


class Tagging:
    """filler: the tokenizer's padding id."""

    task: Task = "tokens"

    def __init__(self, kit: Kit, filler: int) -> None:
        self.kit, self.filler = kit, filler

    @property
    def form(self) -> Hashable:
        return self.task, self.filler

    def size(self, item: Item) -> int:
        return len(item.ids)

    def terms(self, item: Item) -> int:
        return item.learned

    def collate(self, items: Sequence[Item], seeds: Sequence[int] | None) -> Batch:
        ids, mask = pad([item.ids for item in items], self.filler, "right", self.kit.device)
        gold = torch.full(ids.shape, IGNORED)
        for i, item in enumerate(items):
            gold[i, : len(item.labels)] = torch.tensor(item.labels)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return Batch(inputs, {"labels": gold.to(self.kit.device)}, len(items), int(mask.sum()), ids.numel())

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        gold = batch.gold["labels"]
        logits = at_least_float32(model(**batch.inputs).logits)
        nll = F.cross_entropy(logits.transpose(1, 2), gold, ignore_index=IGNORED, reduction="none")
        there = gold != IGNORED
        right = (logits.argmax(2) == gold) & there
        rows = nll.sum(1)
        return Losses((weights * rows).sum(), rows.detach(), right.sum(1).float(), there.sum(1).float())

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        best = model(**batch.inputs).logits.argmax(2)
        return [row[there].tolist() for row, there in zip(best, batch.gold["labels"] != IGNORED, strict=True)]
