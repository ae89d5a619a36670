"""Rows of token ids of unequal length as one rectangle and its mask: the only padding there is.

Padded positions are masked and never read, so any id may fill them. Within `widened` rows are padded to a few lengths,
so that what is compiled by shape meets few. It knows no tokenizer, no model and no label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

_lengths: ContextVar[tuple[int, ...]] = ContextVar("kitout_padded_lengths", default=())


@contextmanager
def widened(lengths: Sequence[int]) -> Iterator[None]:
    """`pad` pads to the least of these lengths that holds the longest row, and to that row where none does."""
    token = _lengths.set(tuple(lengths))
    try:
        yield
    finally:
        _lengths.reset(token)


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [rows, longest row] of int64 on the device; `side` is where the padding stands."""
    longest = max(map(len, rows))
    width = min((length for length in _lengths.get() if length >= longest), default=longest)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        tokens = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        row_ids[tokens], row_mask[tokens] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)
