"""Causal language modeling: each target token from all before it; `lm_head_loss` takes the loss.

Padding is on the right and masked. Packed examples share a row and each starts at position 0 again; transformers makes
a block mask from these position ids, but only without an attention mask and without a cache. In training what all rows
of a forward begin with runs once. It knows encoded examples and a model's call, no chat template and no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kitout.data.by_row import sum_by_row
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.padding import is_widened
from kitout.errors import ConfigError, PackingLeak
from kitout.evaluate.ask.text_limit import has_virtual_tokens
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.answer_rows import collate_rows, position_ids
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.lm_head_loss import HeadLoss, check_causal
from kitout.train.objectives.objective import Batch, Losses
from kitout.train.objectives.shared_beginning import BatchWithBeginning, can_share, shared_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # packed vs. separate: rounding
LEAK_TOLERANCE = 1e-5  # with another neighbor in the row: nothing may change


class CausalLM:
    """Next-token prediction, with or without packing."""

    task: Task = "generation"
    rows: int = 1
    pack_width: int
    """Tokens of a row that several examples share; 0: no packing."""
    head: HeadLoss
    """How the loss is taken; over all logits until `choose_head_loss` has found a cheaper way."""
    shares_beginning: bool
    """Whether what rows begin with runs once, where `choose_head_loss` has found that to give the same."""
    has_prefix: bool
    """Whether it does so behind a prefix, whose rows then share no forward with those of others."""

    def __init__(self, kit: Kit, pack_width: int = 0) -> None:
        self.kit, self.pack_width, self.shares_beginning, self.has_prefix = kit, pack_width, False, False
        self.head = HeadLoss(kit, "full")

    def choose_head_loss(self, names: Sequence[str], items: Sequence[EncodedExample]) -> None:
        """Finds the cheapest exact way to the loss on a few rows. ConfigError for an encoder; PackingLeak if packing
        changes the logits.
        """
        check_causal(self.kit)
        few = sorted((item for item in items if self.num_targets(item)), key=lambda item: item.length)[:2]
        if not few:
            raise ConfigError(f"none of the first {len(items)} examples has a target token: look at the data")
        batch = self.collate(few, None)
        run_model = lambda: self.kit(**batch.inputs)  # noqa: E731
        targets = batch.targets
        self.head = HeadLoss.choose(self.kit, list(names), run_model, targets["positions"], targets["labels"])
        if self.pack_width:
            self._check_packing(few)
        else:
            self.shares_beginning = can_share(self.kit, self.head, few)
            self.has_prefix = self.shares_beginning and has_virtual_tokens(self.kit)

    @property
    def batch_key(self) -> Hashable:
        """None for packed rows: a row holds several examples, so it could not have a job's own adapter active."""
        return None if self.pack_width else ("causal", self.head.mode, self.shares_beginning, self.has_prefix)

    def num_tokens(self, item: EncodedExample) -> int:
        return len(item.input_ids)

    def num_targets(self, item: EncodedExample) -> int:
        return sum(label != IGNORE_INDEX for label in item.labels[1:])

    def collate(self, items: Sequence[EncodedExample], seeds: Sequence[int] | None) -> Batch:
        packed = _pack(items, self.pack_width) if self.pack_width else None
        batch = collate_rows(items, self.kit.device, packed)
        # without seeds it is no training step: each row as a whole, for whoever looks on
        return batch if seeds is None else self.sharing(batch, items)

    def sharing(self, batch: Batch, items: Sequence[EncodedExample]) -> Batch:
        """A batch of these items whose losses and logits are taken with what all begin with run once, if it may."""
        if not self.shares_beginning or is_widened():
            return batch
        return BatchWithBeginning(**batch.__dict__, rows=items)

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        labels, owners = (batch.targets[name] for name in ("labels", "owners"))
        run_model, positions = self._call(model, batch)
        total, nll, is_correct = self.head(run_model, positions, labels, weights[owners])
        terms = (nll.detach(), is_correct.float(), torch.ones_like(nll))
        sums = [sum_by_row(each, owners, batch.num_examples) for each in terms]
        return Losses(total, *sums)

    def target_logits(self, model: Any, batch: Batch) -> Tensor:
        """[N, vocabulary], of the positions that predict a target."""
        return self.head.logits(*self._call(model, batch))

    def _call(self, model: Any, batch: Batch) -> tuple[Callable[[], Any], Tensor]:
        """The model's call, and the positions in what it gives that predict a target."""
        shared = shared_of(self.kit, batch)
        if shared is not None:
            return lambda: shared.run(model, self.kit), shared.positions
        return lambda: model(**batch.inputs), batch.targets["positions"]

    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return []  # answers are generated: kitout.evaluate.ask.generate

    @torch.no_grad()
    def _check_packing(self, items: Sequence[EncodedExample]) -> None:
        """Two examples in one row: each has its own logits, and the second's do not change with the first."""
        if len(items) < 2:
            return
        rows = _pack(items, self.pack_width)
        if len(rows) > 1:
            raise PackingLeak(
                f"train.packing: two of the shortest examples do not fit into one row of {self.pack_width} tokens"
            )
        first, second = (items[i] for i in rows[0])
        reverse = replace(first, input_ids=first.input_ids[::-1], labels=first.labels[::-1])
        packed, packed_with_reverse = (self._logits_of_packed([item, second]) for item in (first, reverse))
        start = len(first.input_ids)
        separate = [self._logits_of_one(item) for item in (first, second)]
        error = max(_relative_error(packed[:start], separate[0]), _relative_error(packed[start:], separate[1]))
        leak = _relative_error(packed[start:], packed_with_reverse[start:])
        if first.input_ids == reverse.input_ids:
            leak = 0.0
        if not (error <= TOLERANCE.get(self.kit.dtype, 1e-4) and leak <= LEAK_TOLERANCE):
            raise PackingLeak(
                f"train.packing: on this model packing changes the logits of an example (relative error "
                f"{max(error, leak):.2g}); write train.packing=false (train.group_by_length saves most of the padding)"
            )

    def _logits_of_one(self, item: EncodedExample) -> Tensor:
        """As everywhere else: the model counts positions itself, virtual tokens before the text included."""
        ids = torch.tensor([item.input_ids], device=self.kit.device)
        logits: Tensor = self.kit(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        return at_least_float32(logits)

    def _logits_of_packed(self, items: Sequence[EncodedExample]) -> Tensor:
        """Of one packed row, in this order."""
        ids = torch.tensor([[t for item in items for t in item.input_ids]], device=self.kit.device)
        positions = position_ids([[len(item.input_ids) for item in items]], ids.shape[1], self.kit.device)
        logits: Tensor = self.kit(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        return at_least_float32(logits)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def _pack(items: Sequence[EncodedExample], width: int) -> list[list[int]]:
    """Best fit, longest first: rows of examples with at most `width` tokens together."""
    rows: list[list[int]] = []
    free_tokens: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: -len(items[i].input_ids)):
        size = len(items[i].input_ids)
        candidates = [r for r, free in enumerate(free_tokens) if free >= size]
        if candidates:
            best = min(candidates, key=free_tokens.__getitem__)
            rows[best].append(i)
            free_tokens[best] -= size
        else:
            rows.append([i])
            free_tokens.append(width - size)
    return rows
