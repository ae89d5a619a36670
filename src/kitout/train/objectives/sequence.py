"""One answer per sequence: a class, a number, or any of several labels, from the model's own sequence logits.

Cross-entropy, mean squared error, or binary cross-entropy over all labels. The loss is taken here and not by the model,
whose own reads its config's number of labels, while an adapter's head may have another. It knows encoded examples and
a model's call, no text and no adapter.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kitout.data.encode.item import EncodedExample
from kitout.data.padding import pad
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.objective import Batch, Losses

SequenceTask = Literal["classification", "regression", "multilabel"]


class SequenceClassification:
    """A class, a number or several labels per sequence."""

    task: Task
    """Selects the loss and the metrics."""
    rows: int = 1
    pad_token_id: int
    """The tokenizer's: transformers' decoders find the last token of a row by it."""

    def __init__(self, kit: Kit, task: SequenceTask, pad_token_id: int) -> None:
        self.kit, self.pad_token_id = kit, pad_token_id
        self.task = task

    @property
    def batch_key(self) -> Hashable:
        return self.task, self.pad_token_id

    def num_tokens(self, item: EncodedExample) -> int:
        return len(item.input_ids)

    def num_targets(self, item: EncodedExample) -> int:
        return 1

    def collate(self, items: Sequence[EncodedExample], seeds: Sequence[int] | None) -> Batch:
        ids, mask = pad([item.input_ids for item in items], self.pad_token_id, "right", self.kit.device)
        dtype = torch.long if self.task == "classification" else torch.promote_types(self.kit.dtype, torch.float32)
        values = torch.tensor([item.label for item in items], dtype=dtype, device=self.kit.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return Batch(inputs, {"values": values}, len(items), int(mask.sum()), ids.numel())

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        logits = at_least_float32(self.logits(model, batch))
        return sequence_losses(self.task, logits, batch.targets["values"], weights)

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return predictions_from_logits(self.task, self.logits(model, batch).float())

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """[B, C], or [B, 1] of a regression."""
        logits: Tensor = model(**batch.inputs).logits
        return logits


def sequence_losses(task: str, logits: Tensor, targets: Tensor, weights: Tensor) -> Losses:
    """logits [B, C] against classes [B], numbers [B] or 0/1 vectors [B, C]."""
    if task == "classification":
        losses = F.cross_entropy(logits, targets, reduction="none")
        is_correct = logits.argmax(1) == targets
    elif task == "regression":
        losses = F.mse_loss(logits.squeeze(1), targets, reduction="none")
        is_correct = torch.zeros_like(losses)
    else:
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        is_correct = ((logits > 0) == (targets > 0.5)).all(1)
    total = (weights * losses).sum()
    return Losses(total, losses.detach(), is_correct.float(), torch.ones_like(losses), logits.detach())


def predictions_from_logits(task: str, logits: Tensor) -> list[Any]:
    """The likeliest class, the number, or the labels above one half, of each row."""
    if task == "classification":
        return logits.argmax(1).tolist()
    return logits.squeeze(1).tolist() if task == "regression" else (logits > 0).int().tolist()
