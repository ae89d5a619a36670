"""Values of tokens, flat [N], by the row each belongs to: sums, means, counts, last tokens.

`owners` [N] is the row of each token, `rows` how many rows there are; a row may have no token. Sums and means are
differentiable. It knows no model, no padding and what no value stands for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by_row(values: Tensor, owners: Tensor, rows: int) -> Tensor:
    """[rows]: the sum of each row's values, 0 for a row without tokens; dtype as values."""
    return torch.zeros(rows, dtype=values.dtype, device=values.device).index_add(0, owners, values)


def count_by_row(owners: Tensor, rows: int) -> Tensor:
    """[rows] of int64: tokens of each row."""
    return sum_by_row(torch.ones_like(owners), owners, rows)


def mean_by_row(values: Tensor, owners: Tensor, rows: int) -> Tensor:
    """[rows]: the mean of each row's values, 0 for a row without tokens."""
    return sum_by_row(values, owners, rows) / count_by_row(owners, rows).clamp(min=1)


def last_by_row(owners: Tensor, rows: int) -> Tensor:
    """[rows] of int64: where in the flat values each row's last token is, -1 for a row without tokens.

    Owners must be sorted.
    """
    counts = count_by_row(owners, rows)
    return torch.where(counts > 0, counts.cumsum(0) - 1, -1)
