"""The leading right singular vectors of rows that come batch by batch, without a mean, and the share of each.

The incremental SVD of EVA (Paischer et al. 2024, arXiv 2410.07170): the rows so far are kept as their leading singular
values and vectors, new rows are put below them and the whole is decomposed again. It stops where the directions agree
with those of half as many rows: agreement from one batch to the next comes before they are right. It knows rows, and no
model and no site.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAME_COSINE = 0.99  # of every direction with itself at half as many rows: it has converged
SPARE = 64  # directions that are kept besides the asked ones, so that what is cut off does not reach those
CHUNK_ROWS = 1024  # of one decomposition at most: its cost grows with their cube
SMALLEST = 1e-7  # a singular value, as a part of the largest: below it is rounding


class InputSVD:
    """Rows so far, as their leading directions."""

    def __init__(self, num_directions: int) -> None:
        self.num_directions = num_directions
        self.values = torch.zeros(0)
        self.vectors: Tensor | None = None
        self.energy = 0.0
        """The sum of the squares of all rows."""
        self.num_rows = 0
        self.has_converged = False
        self._reference: tuple[int, Tensor] | None = None  # number of rows, and the directions then

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """rows: [n, d]. Nothing changes after convergence."""
        if self.has_converged or not len(rows):
            return
        for chunk in rows.split(CHUNK_ROWS):
            self._add(chunk.double())
        self.num_rows += len(rows)
        if self._reference is not None and self.num_rows < 2 * self._reference[0]:
            return
        assert self.vectors is not None
        now, before = self.vectors[: self.num_directions], self._reference and self._reference[1]
        if before is not None and before.shape == now.shape:
            self.has_converged = bool(((before * now).sum(1).abs() >= SAME_COSINE).all())
        self._reference = self.num_rows, now

    def _add(self, rows: Tensor) -> None:
        self.energy += float(rows.square().sum())
        old = self.vectors
        matrix = rows if old is None else torch.cat([self.values[:, None] * old, rows])
        is_wide = matrix.shape[0] <= matrix.shape[1]
        squares, basis = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)  # of the smaller side
        values = squares.flip(0).clamp_min(0.0).sqrt()
        kept = min(self.num_directions + SPARE, int((values > SMALLEST * values[0]).sum()))
        basis, self.values = basis.flip(1)[:, :kept], values[:kept]
        self.vectors = (basis.T @ matrix) / self.values[:, None] if is_wide else basis.T

    def directions(self) -> Tensor:
        """[at most num_directions, d] in float32 on CPU, orthonormal, the leading one first."""
        if self.vectors is None:
            return torch.zeros(0, 0)
        return self.vectors[: self.num_directions].float().cpu()

    def explained(self) -> tuple[float, ...]:
        """By direction: its share of the rows' sum of squares."""
        total = self.energy or 1.0
        return tuple((self.values[: self.num_directions].square() / total).tolist())
