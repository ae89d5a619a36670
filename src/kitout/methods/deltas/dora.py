"""DoRA: the frozen weight plus a low-rank change, renormalized row by row to a learned magnitude.

Liu et al. 2024 (arXiv 2402.09353), eq. 5 and 4.3: W' = m * (W + s B A) / ||W + s B A||, the norm over the input axis
and held constant in the gradient; the bias is not scaled. m starts at ||W||, B at 0: a new one is the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout.base.weights import FrozenModule
from kitout.delta import Delta


class DoRADelta(Delta):
    """y' = b + m / ||W + s B A|| * (W x + s B A dropout(x))."""

    reads_weight = True
    loraplus_parameters = ("b",)

    def __init__(self, a: Tensor, b: Tensor, magnitude: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.magnitude = nn.Parameter(a), nn.Parameter(b), nn.Parameter(magnitude)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        assert frozen is not None
        dtype, bias = y.dtype, frozen.bias
        if x.is_floating_point():
            x = F.dropout(x.to(dtype), self.dropout, self.training)
        change = self.scale * frozen.apply_low_rank(x, self.a.to(dtype), self.b.to(dtype), y)
        ratio = (self.magnitude / self.norm(frozen.weight)).to(dtype)
        if bias is None:
            return ratio * (y + change)
        return ratio * (y - bias + change) + bias

    @torch.no_grad()
    def norm(self, w: Tensor) -> Tensor:
        """||W + s B A|| by row, without forming the sum: |w|^2 + 2 s b.(A w) + s^2 b (A A^T) b, [d_out]."""
        a, b, w = self.a, self.b, w.to(self.a.dtype)
        cross = ((w @ a.t()) * b).sum(1)
        square = ((b @ (a @ a.t())) * b).sum(1)
        return (w.square().sum(1) + 2 * self.scale * cross + self.scale**2 * square).clamp_min(1e-24).sqrt()

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        new = w + self.scale * (self.b.to(w.dtype) @ self.a.to(w.dtype))
        return new * (self.magnitude.to(w.dtype) / new.detach().norm(dim=1).clamp_min(1e-12))[:, None], b
