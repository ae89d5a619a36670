"""Sequence to sequence: a target written after a source was read, by encoder-decoders.

The decoder reads the target moved by one place behind the model's own start token; every target token is learnt, its
end included. The head is asked for the real positions alone (`lm_head_loss`). It knows items and a model's call.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kitout.data.encode.item import EncodedExample
from kitout.data.padding import pad
from kitout.errors import ConfigError
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.lm_head_loss import HeadLoss
from kitout.train.objectives.objective import Batch, Losses


class Seq2SeqLM:
    """`prepare` finds the cheapest exact way to the loss."""

    task: Task = "generation"

    def __init__(self, kit: Kit, pad_token_id: int) -> None:
        self.kit, self.pad_token_id = kit, pad_token_id
        self.decoder_start_id = kit.config.decoder_start_token_id
        if self.decoder_start_id is None:
            raise ConfigError("the model's config names no decoder_start_token_id: it is no encoder-decoder to train")
        self.head = HeadLoss(kit, "full")

    def choose_head_loss(self, names: Sequence[str], items: Sequence[EncodedExample]) -> None:
        """Finds the cheapest exact way to the loss on a few rows."""
        batch = self.collate(sorted(items, key=lambda item: item.length)[:2], None)
        call = lambda: self.kit(**batch.inputs)  # noqa: E731
        self.head = HeadLoss.choose(self.kit, list(names), call, batch.targets["places"], batch.targets["labels"])

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
        read, there = pad(
            [(self.decoder_start_id, *item.target_ids[:-1]) for item in items], self.pad_token_id, "right", device
        )
        inputs: dict[str, Any] = {
            "input_ids": ids, "attention_mask": mask, "decoder_input_ids": read, "decoder_attention_mask": there,
            "use_cache": False,
        }  # fmt: skip
        gold = {
            "places": there.flatten().nonzero().squeeze(1),
            "labels": torch.tensor([t for item in items for t in item.target_ids], device=device),
            "owners": torch.tensor([i for i, item in enumerate(items) for _ in item.target_ids], device=device),
        }
        tokens = sum(item.length for item in items)
        return Batch(inputs, gold, len(items), tokens, ids.numel() + read.numel())

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        gold = batch.targets
        owners = gold["owners"]
        total, nll, right = self.head(lambda: model(**batch.inputs), gold["places"], gold["labels"], weights[owners])
        zeros = torch.zeros(batch.num_examples, dtype=nll.dtype, device=nll.device)
        sums = [zeros.index_add(0, owners, v.detach()) for v in (nll, right.to(nll.dtype), torch.ones_like(nll))]
        return Losses(total, *sums)

    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return []  # answers are written: kitout.evaluate.ask.generate
