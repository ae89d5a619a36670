"""Sums and means by row, rows without tokens included; gradients reach every token."""

from __future__ import annotations

import torch

from kitout.data.by_row import count_by_row, last_by_row, mean_by_row, sum_by_row

VALUES = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64, requires_grad=True)
OWNERS = torch.tensor([0, 0, 2, 2])


def test_values_by_row() -> None:
    assert sum_by_row(VALUES, OWNERS, 4).tolist() == [3.0, 0.0, 12.0, 0.0]
    assert mean_by_row(VALUES, OWNERS, 4).tolist() == [1.5, 0.0, 6.0, 0.0]
    assert count_by_row(OWNERS, 4).tolist() == [2, 0, 2, 0]
    assert last_by_row(OWNERS, 4).tolist() == [1, -1, 3, -1]
    assert sum_by_row(VALUES[:0], OWNERS[:0], 2).tolist() == [0.0, 0.0]


def test_gradients() -> None:
    weights = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(sum_by_row(VALUES, OWNERS, 3) @ weights, VALUES)
    assert grad.tolist() == [1.0, 1.0, 3.0, 3.0]
    (grad,) = torch.autograd.grad(mean_by_row(VALUES, OWNERS, 3) @ weights, VALUES)
    assert grad.tolist() == [0.5, 0.5, 1.5, 1.5]
