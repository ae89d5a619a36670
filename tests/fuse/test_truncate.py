"""Matrices cut to a rank: products as dense ones, the best approximation, what is lost as measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kitout.fuse import truncate
from kitout.fuse.truncate import (
    product_squares,
    rank_for,
    singular_squares,
    truncate_matrix,
    truncate_product,
)


@pytest.fixture
def factors() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(12, 40, generator=draw), torch.randn(30, 12, generator=draw)


def test_a_product_is_cut_as_the_dense_matrix(factors: tuple[Tensor, Tensor]) -> None:
    a, b = factors
    matrix = b @ a
    u, s, v = torch.linalg.svd(matrix.double())
    for cut in (truncate_product(a, b, 5, None), truncate_matrix(matrix, 5, None)):
        assert torch.allclose((cut.b @ cut.a).double(), (u[:, :5] * s[:5]) @ v[:5], atol=1e-4)
        lost = float((matrix - cut.b @ cut.a).double().square().sum())
        assert cut.lost == pytest.approx(lost, rel=1e-4)
        assert cut.total == pytest.approx(float(matrix.double().square().sum()), rel=1e-5)
    assert torch.allclose(product_squares(a, b), s[:12].square(), rtol=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_is_the_smallest_rank_that_keeps_it(factors: tuple[Tensor, Tensor], energy: float) -> None:
    a, b = factors
    squares = product_squares(a, b)
    for cut in (truncate_product(a, b, None, energy), truncate_matrix(b @ a, None, energy)):
        rank = cut.a.shape[0]
        assert float(squares[:rank].sum()) >= (energy - 1e-6) * float(squares.sum())
        assert float(squares[: rank - 1].sum()) < energy * float(squares.sum())


def test_equal_products_cancel(factors: tuple[Tensor, Tensor]) -> None:
    a, b = factors
    cut = truncate_product(torch.cat((a, a)), torch.cat((b, -b), 1), 3, None, 1e-14 * float((b @ a).square().sum()))
    assert (cut.total, cut.lost) == (0.0, 0.0)
    assert not (cut.b @ cut.a).any()


def test_large_matrices_are_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    decay = torch.arange(1, 65).float() ** -1.5
    matrix = (torch.randn(80, 64, generator=draw) * decay) @ torch.randn(64, 90, generator=draw)
    exact = torch.linalg.svdvals(matrix.double()).square()
    monkeypatch.setattr(truncate, "LARGEST_FULL_SVD", {"rank": 16, "energy": 16})
    state = torch.random.get_rng_state()
    cut = truncate_matrix(matrix, 8, None)
    assert torch.equal(state, torch.random.get_rng_state())
    assert cut.lost == pytest.approx(float((matrix - cut.b @ cut.a).double().square().sum()), rel=1e-6)
    assert cut.lost <= 1.01 * float(exact[8:].sum())
    energetic = truncate_matrix(matrix, None, 0.99)
    assert energetic.lost <= 0.0101 * float(exact.sum())
    assert energetic.a.shape[0] == int((exact.cumsum(0) < 0.99 * exact.sum()).sum()) + 1
    assert torch.allclose(singular_squares(matrix)[:20], exact[:20], rtol=1e-3)


def test_the_rank_that_would_do() -> None:
    spectra = [torch.tensor([4.0, 2.0, 1.0]).double(), torch.tensor([3.0, 1.0]).double()]
    assert rank_for(spectra, 0.0, 4.0) == 1
    assert rank_for(spectra, 0.0, 3.9) == 2
    assert rank_for(spectra, 0.0, 0.5) == 3
    assert rank_for(spectra, 0.6, 0.5) is None
