"""Language modelling: each learnt token from all before it, by the head that suits (`lm_head_loss`).

Padding stands on the right and is masked; packed examples share a row, start at position 0 again and are parted by
their positions, which transformers turns into a block mask only without a mask and without a cache. It knows items and
a model's call, no template and no adapter.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.padding import pad
from kitout.errors import ConfigError, KitoutError
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.lm_head_loss import HeadLoss
from kitout.train.objectives.objective import Batch, Losses

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # packed to separate: rounding
LEAK_TOLERANCE = 1e-5  # of what else stands in the row: nothing


class PackingLeak(KitoutError, RuntimeError):
    """Packed examples see each other on this model."""


class CausalLM:
    """head None: `prepare` finds the way. pack: rows of up to so many tokens hold several examples; 0: none."""

    task: Task = "generation"

    def __init__(self, kit: Kit, pack_width: int = 0) -> None:
        self.kit, self.pack_width = kit, pack_width
        self.head = HeadLoss(kit, "full")

    def choose_head_loss(self, names: Sequence[str], items: Sequence[EncodedExample]) -> None:
        """Finds the cheapest exact way to the loss on a few rows; Leaks if packed ones are not what they are alone."""
        few = sorted((item for item in items if self.num_targets(item)), key=lambda item: item.length)[:2]
        if not few:
            raise ConfigError(f"none of the first {len(items)} examples has a token to learn: look at the data")
        batch = self.collate(few, None)
        gold = batch.targets
        call = lambda: self.kit(**batch.inputs)  # noqa: E731
        self.head = HeadLoss.choose(self.kit, list(names), call, gold["places"], gold["labels"])
        if self.pack_width:
            self._check_packing(few)

    @property
    def batch_key(self) -> Hashable:
        """Packed rows hold several examples, so a row could not wear a job's own adapter."""
        return None if self.pack_width else ("causal", self.head.mode)

    def num_tokens(self, item: EncodedExample) -> int:
        return len(item.input_ids)

    def num_targets(self, item: EncodedExample) -> int:
        return sum(label != IGNORE_INDEX for label in item.labels[1:])

    def collate(self, items: Sequence[EncodedExample], seeds: Sequence[int] | None) -> Batch:
        device = self.kit.device
        rows = _pack(items, self.pack_width) if self.pack_width else [[i] for i in range(len(items))]
        ids, mask = pad([[t for i in row for t in items[i].input_ids] for row in rows], 0, "right", device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.pack_width:
            del inputs["attention_mask"]  # with one, transformers no longer parts rows by their positions
            inputs["position_ids"] = _position_ids(
                [[len(items[i].input_ids) for i in row] for row in rows], ids.shape[1], device
            )
        places, labels, owners = [], [], []
        for r, row in enumerate(rows):
            start = r * ids.shape[1]
            for i in row:
                for t, label in enumerate(items[i].labels):
                    if t and label != IGNORE_INDEX:
                        places.append(start + t - 1)
                        labels.append(label)
                        owners.append(i)
                start += len(items[i].input_ids)
        gold = {"places": places, "labels": labels, "owners": owners}
        tokens = sum(len(item.input_ids) for item in items)
        held = {name: torch.tensor(value, dtype=torch.long, device=device) for name, value in gold.items()}
        return Batch(inputs, held, len(items), tokens, ids.numel())

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        gold = batch.targets
        owners = gold["owners"]
        total, nll, right = self.head(lambda: model(**batch.inputs), gold["places"], gold["labels"], weights[owners])
        sums = [_sum_by_owner(v, owners, batch.num_examples) for v in (nll, right.float(), torch.ones_like(nll))]
        return Losses(total, *sums)

    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return []  # answers are written, not read off one call: kitout.evaluate.ask.generate

    @torch.no_grad()
    def _check_packing(self, items: Sequence[EncodedExample]) -> None:
        """Two examples in one row: each as it is alone, and the second the same whatever the first says."""
        if len(items) < 2:
            return
        rows = _pack(items, self.pack_width)
        if len(rows) > 1:
            raise PackingLeak(
                f"train.packing: two of the shortest examples do not fit into one row of {self.pack_width} tokens"
            )
        first, second = (items[i] for i in rows[0])
        other = replace(first, input_ids=first.input_ids[::-1], labels=first.labels[::-1])
        together, changed = (self._logits_of_packed([item, second]) for item in (first, other))
        start = len(first.input_ids)
        apart = [self._logits_of_one(item) for item in (first, second)]
        off = max(_relative_error(together[:start], apart[0]), _relative_error(together[start:], apart[1]))
        seen = 0.0 if first.input_ids == other.input_ids else _relative_error(together[start:], changed[start:])
        if not (off <= TOLERANCE.get(self.kit.dtype, 1e-4) and seen <= LEAK_TOLERANCE):
            raise PackingLeak(
                f"train.packing: on this model packed examples are not what they are alone (their logits are "
                f"{max(off, seen):.2g} off, of 1); write train.packing=false (train.group_by_length saves most of the "
                "padding)"
            )

    def _logits_of_one(self, item: EncodedExample) -> Tensor:
        """As everywhere else: the model, and whatever stands in front of its text, counts positions itself."""
        ids = torch.tensor([item.input_ids], device=self.kit.device)
        logits: Tensor = self.kit(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        return at_least_float32(logits)

    def _logits_of_packed(self, items: Sequence[EncodedExample]) -> Tensor:
        """Of one packed row, in the order given."""
        ids = torch.tensor([[t for item in items for t in item.input_ids]], device=self.kit.device)
        places = _position_ids([[len(item.input_ids) for item in items]], ids.shape[1], self.kit.device)
        logits: Tensor = self.kit(input_ids=ids, position_ids=places, use_cache=False).logits[0]
        return at_least_float32(logits)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def _sum_by_owner(values: Tensor, owners: Tensor, num_examples: int) -> Tensor:
    return torch.zeros(num_examples, dtype=values.dtype, device=values.device).index_add_(0, owners, values.detach())


def _pack(items: Sequence[EncodedExample], width: int) -> list[list[int]]:
    """Best fit, longest first: rows of examples with at most `width` tokens together."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: -len(items[i].input_ids)):
        size = len(items[i].input_ids)
        fits = [r for r, left in enumerate(room) if left >= size]
        if fits:
            best = min(fits, key=room.__getitem__)
            rows[best].append(i)
            room[best] -= size
        else:
            rows.append([i])
            room.append(width - size)
    return rows


def _position_ids(lengths: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    """[B, T]: from 0 in every example, and from 0 again in the filling, which is one more example."""
    rows = []
    for row in lengths:
        counted = [t for n in row for t in range(n)]
        rows.append(counted + list(range(width - len(counted))))
    return torch.tensor(rows, device=device)
