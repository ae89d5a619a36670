"""Sequence to sequence, for encoder-decoders: the encoder reads the source, the decoder predicts the target.

The decoder's input is the target shifted right behind the model's own start token; every target token is trained on,
the end token included. The head sees real positions alone (`lm_head_loss`). It knows encoded examples and a model's
call.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kitout.data.by_row import sum_by_row
from kitout.data.encode.item import EncodedExample
from kitout.data.padding import pad
from kitout.errors import ConfigError
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.lm_head_loss import HeadLoss
from kitout.train.objectives.objective import Batch, Losses


class Seq2SeqLM:
    """Target tokens from a source and the target tokens before them."""

    task: Task = "generation"
    rows: int = 1
    head: HeadLoss
    """How the loss is taken; over all logits until `choose_head_loss` has found a cheaper way."""

    def __init__(self, kit: Kit, pad_token_id: int) -> None:
        self.kit, self.pad_token_id = kit, pad_token_id
        self.decoder_start_id = kit.config.decoder_start_token_id
        if self.decoder_start_id is None:
            raise ConfigError("the model's config has no decoder_start_token_id: it is not an encoder-decoder")
        self.head = HeadLoss(kit, "full")

    def choose_head_loss(self, names: Sequence[str], items: Sequence[EncodedExample]) -> None:
        """Finds the cheapest exact way to the loss on a few rows."""
        batch = self.collate(sorted(items, key=lambda item: item.length)[:2], None)
        run_model = lambda: self.kit(**batch.inputs)  # noqa: E731
        targets = batch.targets
        self.head = HeadLoss.choose(self.kit, list(names), run_model, targets["positions"], targets["labels"])

    @property
    def batch_key(self) -> Hashable:
        return "seq2seq", self.pad_token_id, self.head.mode

    def num_tokens(self, item: EncodedExample) -> int:
        return item.length

    def num_targets(self, item: EncodedExample) -> int:
        return len(item.target_ids)

    def collate(self, items: Sequence[EncodedExample], seeds: Sequence[int] | None) -> Batch:
        device = self.kit.device
        ids, mask = pad([item.input_ids for item in items], self.pad_token_id, "right", device)
        decoder_ids, decoder_mask = pad(
            [(self.decoder_start_id, *item.target_ids[:-1]) for item in items], self.pad_token_id, "right", device
        )
        inputs: dict[str, Any] = {
            "input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids,
            "decoder_attention_mask": decoder_mask,
            "use_cache": False,
        }  # fmt: skip
        targets = {
            "positions": decoder_mask.flatten().nonzero().squeeze(1),
            "labels": torch.tensor([t for item in items for t in item.target_ids], device=device),
            "owners": torch.tensor([i for i, item in enumerate(items) for _ in item.target_ids], device=device),
        }
        num_tokens = sum(item.length for item in items)
        return Batch(inputs, targets, len(items), num_tokens, ids.numel() + decoder_ids.numel())

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        positions, labels, owners = (batch.targets[name] for name in ("positions", "labels", "owners"))
        total, nll, is_correct = self.head(lambda: model(**batch.inputs), positions, labels, weights[owners])
        each = (nll, is_correct.to(nll.dtype), torch.ones_like(nll))
        sums = [sum_by_row(value, owners, batch.num_examples) for value in each]
        return Losses(total, *sums)

    def target_logits(self, model: Any, batch: Batch) -> Tensor:
        """[N, vocabulary], of the positions that predict a target."""
        return self.head.logits(lambda: model(**batch.inputs), batch.targets["positions"])

    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return []  # answers are generated: kitout.evaluate.ask.generate
