"""The directions of rows that come in batches, against the decomposition of all of them."""

from __future__ import annotations

import pytest
import torch

from kitout.signals.input_svd import InputSVD


def rows_with_spectrum(num: int, width: int, decay: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    return torch.randn(num, width, generator=generator).double() * decay ** torch.arange(width) @ basis


@pytest.mark.parametrize(("num", "width", "batch"), [(900, 160, 64), (300, 300, 7), (200, 40, 200)])
def test_directions_and_shares_are_those_of_all_rows(num: int, width: int, batch: int) -> None:
    rows = rows_with_spectrum(num, width, 0.9)
    svd = InputSVD(12)
    for part in rows.split(batch):
        svd.update(part)
    seen = rows[: svd.num_rows]
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    assert (svd.directions().double() * vectors[:12]).sum(1).abs().min() >= 0.99
    values = torch.linalg.svdvals(seen).square()
    torch.testing.assert_close(torch.tensor(svd.explained()).double(), (values / values.sum())[:12], rtol=1e-3, atol=0)
    identity = svd.directions() @ svd.directions().T
    torch.testing.assert_close(identity, torch.eye(12), rtol=0, atol=1e-5)


def test_it_stops_where_more_rows_change_nothing() -> None:
    rows = rows_with_spectrum(64, 30, 0.5)
    svd = InputSVD(4)
    for _ in range(5):
        svd.update(rows)
    assert svd.has_converged
    assert svd.num_rows == 128


def test_few_rows_have_few_directions() -> None:
    svd = InputSVD(8)
    assert svd.directions().numel() == 0
    svd.update(torch.zeros(0, 20))
    svd.update(torch.zeros(3, 20))
    assert svd.explained() == ()
    svd.update(torch.ones(3, 20))
    assert svd.directions().shape == (1, 20)
    assert svd.explained() == pytest.approx((1.0,))
