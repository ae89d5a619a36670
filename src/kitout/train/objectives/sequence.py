"""One answer per sequence: a class, a number, or any of several labels, from the model's own sequence logits.

Cross-entropy, mean squared error, or binary cross-entropy over all labels. The loss is taken here and not by the model,
whose own reads its config's number of labels, while an adapter's head may have another. It knows items and a model's
call, no text and no adapter.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kitout.data.encode.item import Item
from kitout.data.padding import pad
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.batch import Batch
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.objective import Losses

Kind = Literal["classification", "regression", "multilabel"]


class Labels:
    """task: by which the loss and the metrics are chosen. filler: the tokenizer's padding id.

    The filler matters here: transformers' decoders find the last token of a row by it.
    """

    def __init__(self, kit: Kit, task: Kind, filler: int) -> None:
        self.kit, self.filler = kit, filler
        self.task: Task = task

    @property
    def form(self) -> Hashable:
        return self.task, self.filler

    def size(self, item: Item) -> int:
        return len(item.ids)

    def terms(self, item: Item) -> int:
        return 1

    def collate(self, items: Sequence[Item], seeds: Sequence[int] | None) -> Batch:
        ids, mask = pad([item.ids for item in items], self.filler, "right", self.kit.device)
        form = torch.long if self.task == "classification" else torch.promote_types(self.kit.dtype, torch.float32)
        gold = torch.tensor([item.value for item in items], dtype=form, device=self.kit.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return Batch(inputs, {"values": gold}, len(items), int(mask.sum()), ids.numel())

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        return value_losses(self.task, at_least_float32(model(**batch.inputs).logits), batch.gold["values"], weights)

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return read_off(self.task, model(**batch.inputs).logits.float())


def value_losses(task: str, logits: Tensor, gold: Tensor, weights: Tensor) -> Losses:
    """logits [B, C] against classes [B], numbers [B] or 0/1 vectors [B, C]."""
    if task == "classification":
        rows, right = F.cross_entropy(logits, gold, reduction="none"), logits.argmax(1) == gold
    elif task == "regression":
        rows = F.mse_loss(logits.squeeze(1), gold, reduction="none")
        right = torch.zeros_like(rows)
    else:
        rows = F.binary_cross_entropy_with_logits(logits, gold, reduction="none").mean(1)
        right = ((logits > 0) == (gold > 0.5)).all(1)
    return Losses((weights * rows).sum(), rows.detach(), right.float(), torch.ones_like(rows), logits.detach())


def read_off(task: str, logits: Tensor) -> list[Any]:
    """The likeliest class, the number, or the labels above one half, of each row."""
    if task == "classification":
        return logits.argmax(1).tolist()
    return logits.squeeze(1).tolist() if task == "regression" else (logits > 0).int().tolist()
