"""Matrices cut to a low rank: products without forming them, dense ones by a full or a randomized SVD.

A sum of LoRAs is B A with B [d_out, R] and A [R, d_in]: QR of both sides leaves a core of R x R, whose SVD is that of
the whole. It knows matrices alone, nothing of adapters or sites. Source of the randomized form: Halko et al. 2011.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Shorter side of a matrix above which the SVD is randomized. A share of the energy may need most of the spectrum.
LARGEST_FULL_SVD = {"rank": 256, "energy": 1024}
OVERSAMPLING, POWER_ITERATIONS = 8, 4


@dataclass
class Truncated:
    """A matrix of low rank and what it leaves."""

    a: Tensor
    """[r, d_in]."""
    b: Tensor
    """[d_out, r]."""
    total: float
    """Square of the norm of the matrix."""
    lost: float
    """Square of the norm of what is left out."""


def inner_product(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> float:
    """Of two products b a and b2 a2."""
    a, b, a2, b2 = a.double(), b.double(), a2.double(), b2.double()
    return float(((b.T @ b2) * (a @ a2.T)).sum())


def truncate_product(a: Tensor, b: Tensor, rank: int | None, energy: float | None, zero: float = 0.0) -> Truncated:
    """The product b a at a rank, or at the smallest one that holds this share of the squared singular values.

    zero: squares of singular values below it are rounding.
    """
    q_b, core, q_a = _core(a, b)
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    squares = s.square()
    squares = torch.where(squares > zero, squares, 0.0)
    r = min(len(s), _rank(squares, energy) if rank is None else rank)
    root = squares[:r].sqrt().sqrt()
    a, b = (root[:, None] * (v[:r] @ q_a.T)).to(a.dtype), (q_b @ (u[:, :r] * root)).to(b.dtype)
    return Truncated(a, b, float(squares.sum()), float(squares[r:].sum()))


def truncate_matrix(matrix: Tensor, rank: int | None, energy: float | None) -> Truncated:
    """A dense matrix [d_out, d_in], cut like a product; what it leaves is measured."""
    least = min(matrix.shape)
    total = float(matrix.double().square().sum())
    if least <= LARGEST_FULL_SVD["energy" if rank is None else "rank"] or (
        rank is not None and rank + OVERSAMPLING > least // 2
    ):
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        q = (16 if rank is None else rank) + OVERSAMPLING
        while True:
            u, s, v = _randomized_svd(matrix, min(q, least))
            if energy is None or q >= least or float(s[:-OVERSAMPLING].square().sum()) >= energy * total:
                break
            q = 2 * q
    squares = s.double().square()
    r = min(len(s), _rank(squares, energy, total) if rank is None else rank)
    root = squares[:r].sqrt().sqrt()
    a, b = (root[:, None] * v[:r]).to(matrix.dtype), (u[:, :r] * root).to(matrix.dtype)
    lost = float((matrix - b @ a).double().square().sum())
    return Truncated(a, b, total, lost)


def singular_squares(matrix: Tensor) -> Tensor:
    """Squares of the singular values of a dense matrix, the largest first."""
    if min(matrix.shape) <= LARGEST_FULL_SVD["energy"]:
        return torch.linalg.svdvals(matrix.double()).square().cpu()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0).double().cpu()


def product_squares(a: Tensor, b: Tensor) -> Tensor:
    """The same of a product b a."""
    return torch.linalg.svdvals(_core(a, b)[1]).square().cpu()


def rank_for(spectra: Sequence[Tensor], lost: float, allowed: float) -> int | None:
    """The smallest rank, the same everywhere, that leaves at most `allowed` of all squares; None where none does.

    lost: what no rank holds.
    """
    longest = max(map(len, spectra), default=0)
    tails = torch.zeros(longest + 1, dtype=torch.float64)
    for squares in spectra:
        tails[: len(squares)] += squares.flip(0).cumsum(0).flip(0)
    enough = (tails + lost <= allowed).nonzero()
    return max(1, int(enough[0])) if len(enough) else None


def _core(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal Q_b, a small core and Q_a with b a = Q_b core Q_a^T, in fp64."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    return q_b, r_b @ r_a.T, q_a


def _rank(squares: Tensor, energy: float | None, total: float | None = None) -> int:
    """The smallest rank that holds this share."""
    assert energy is not None
    wanted = energy * (float(squares.sum()) if total is None else total)
    reached = (squares.cumsum(0) >= wanted * (1 - 1e-12)).nonzero()
    return int(reached[0]) + 1 if len(reached) else len(squares)


def _randomized_svd(matrix: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first q singular triples, nearly: a random sketch of the columns and a few power iterations."""
    sketch = torch.randn(matrix.shape[1], q, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ sketch.to(matrix.device, matrix.dtype))[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, v
