"""Encoded texts as rows of a batch, and which positions of it predict the tokens that are trained on or scored.

Padding is on the right and masked, so whatever stands at a row's start stays where it was. Causal language modeling and
everything that scores answers by their log-probabilities share it. It knows encoded examples, and no model, no adapter
and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.padding import pad
from kitout.train.objectives.objective import Batch


def collate_rows(
    rows: Sequence[EncodedExample], device: torch.device, packed: Sequence[Sequence[int]] | None = None
) -> Batch:
    """One row per example, in their order, padded on the right. packed: by row the indices of the examples it holds.

    Targets, [N] each over the tokens with a label, example by example: `positions` in the flattened [B * T] (of the
    token before), `labels`, `owners` (the index of the example). A row's first token is predicted by nothing. The batch
    counts these examples, so an objective whose items are pairs has two per item.
    """
    groups = [[i] for i in range(len(rows))] if packed is None else packed
    ids, mask = pad([[t for i in group for t in rows[i].input_ids] for group in groups], 0, "right", device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if packed is not None:
        del inputs["attention_mask"]  # with one, transformers makes no block mask from the position ids
        lengths = [[len(rows[i].input_ids) for i in group] for group in groups]
        inputs["position_ids"] = position_ids(lengths, ids.shape[1], device)
    positions, labels, owners = [], [], []
    starts: dict[int, int] = {}
    for r, group in enumerate(groups):
        start = r * ids.shape[1]
        for i in group:
            starts[i] = start
            for t, label in enumerate(rows[i].labels):
                if t and label != IGNORE_INDEX:
                    positions.append(start + t - 1)
                    labels.append(label)
                    owners.append(i)
            start += len(rows[i].input_ids)
    targets = {
        name: torch.tensor(values, dtype=torch.long, device=device)
        for name, values in (("positions", positions), ("labels", labels), ("owners", owners))
    }
    index = None
    if packed is not None:
        places = [starts[i] + t for i, row in enumerate(rows) for t in range(len(row.input_ids))]
        index = torch.tensor(places, device=device)
    return Batch(inputs, targets, len(rows), sum(len(row.input_ids) for row in rows), ids.numel(), index)


def position_ids(lengths: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    """[B, T]: from 0 in every example, and from 0 again in the padding, as if it were one more example."""
    rows = []
    for row in lengths:
        positions = [t for n in row for t in range(n)]
        rows.append(positions + list(range(width - len(positions))))
    return torch.tensor(rows, device=device)
