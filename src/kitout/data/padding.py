"""Rows of token ids of unequal length as one rectangle and its mask: the only padding there is.

Padded positions are masked and never read, so any id may fill them. It knows no tokenizer, no model and no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [rows, longest row] of int64 on the device; `side` is where the padding stands."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        tokens = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        row_ids[tokens], row_mask[tokens] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)
