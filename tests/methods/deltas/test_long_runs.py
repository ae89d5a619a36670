"""Long runs of rows without gradients go run by run: the same values as each row through its own LoRA."""

from __future__ import annotations

import pytest
import torch

from kitout.methods.deltas import low_rank
from kitout.methods.deltas.low_rank import RUN_POSITIONS, LowRankDelta


def deltas() -> list[LowRankDelta]:
    """Of different ranks and scales; the last one counts from a start."""
    torch.manual_seed(0)
    made = [
        LowRankDelta(torch.randn(rank, 6).double(), torch.randn(5, rank).double(), scale)
        for rank, scale in ((2, 1.0), (3, 0.5), (2, 2.0))
    ]
    made[-1].subtract_start(torch.randn(2, 6).double(), torch.randn(5, 2).double())
    return made


@pytest.mark.parametrize("rows", [(0, 0, -1, 1), (-1, 2, 2, 0), (0, 1, 0, -1), (1, 1, 1, 1)])
@pytest.mark.parametrize("tokens", [RUN_POSITIONS, 1])
def test_each_row_is_mapped_by_its_own(rows: tuple[int, ...], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    each = deltas()
    x, y = torch.randn(len(rows), tokens, 6).double(), torch.randn(len(rows), tokens, 5).double()
    runs, add_to_runs = [], low_rank.add_to_runs
    monkeypatch.setattr(low_rank, "add_to_runs", lambda *args: runs.append(args[2]) or add_to_runs(*args))
    with torch.no_grad():
        expected = torch.stack([y[i] if n < 0 else each[n](x[i], y[i]) for i, n in enumerate(rows)])
        found = LowRankDelta.forward_rows(each, rows, x, y.clone(), {})
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert bool(runs) == (tokens == RUN_POSITIONS)


def test_a_frozen_adapter_in_a_training_forward_overwrites_nothing() -> None:
    each = deltas()
    for delta in each:
        delta.requires_grad_(False)
    x, y = torch.randn(2, 64, 6).double().requires_grad_(), torch.randn(2, 64, 5).double()
    before = y.clone()
    found = LowRankDelta.forward_rows(each, (0, 1), x, y, {})
    assert found is not None
    assert found.requires_grad
    assert torch.equal(y, before)
