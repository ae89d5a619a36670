"""Rows of any length become one rectangle, padded on the requested side, and the mask says where."""

from __future__ import annotations

import torch

from kitout.data.padding import pad


def test_either_side() -> None:
    rows, cpu = [(5, 6, 7), [8]], torch.device("cpu")
    ids, mask = pad(rows, 0, "right", cpu)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad(rows, 9, "left", cpu)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64
