"""DoRA: the frozen weight plus a low-rank change, renormalized row by row to a learned magnitude.

Liu et al. 2024 (arXiv 2402.09353), eq. 5 and 4.3: W' = m * (W + s B A) / ||W + s B A||, the norm over the input axis
and held constant in the gradient; the bias is not scaled. m starts at ||W||, B at 0: a new one is the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from kitout.base.weights import FrozenModule
from kitout.delta import Delta
from kitout.methods.deltas.fused_affine import scale_shift
from kitout.methods.deltas.fused_low_rank import fused_low_rank
from kitout.methods.deltas.fusing import is_fusable
from kitout.tensor_version import tensor_version

# |w|^2 by row of frozen weights, as long as they are there and not written to.
_squares: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def frozen_square(w: Tensor, dtype: torch.dtype) -> Tensor:
    """|w|^2 by row, [d_out], computed once for a weight."""
    stamp = (*tensor_version(w, is_frozen=True), dtype)
    kept = _squares.get(w)
    if kept is None or kept[0] != stamp:
        kept = _squares[w] = (stamp, w.to(dtype).square().sum(1))
    square: Tensor = kept[1]
    return square


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

    def fused_linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        if not (torch.is_grad_enabled() and self.a.requires_grad and is_fusable(x, w)) or self._drops_inputs:
            return None
        (y,) = fused_low_rank(x, [(w, None)], [(self.a, self.b, self.scale)])
        return scale_shift(y, self.magnitude / self._fast_norm(w), b)

    @property
    def _drops_inputs(self) -> bool:
        return self.dropout > 0 and self.training

    @torch.no_grad()
    def _fast_norm(self, w: Tensor) -> Tensor:
        """`norm`, with the products in the base's dtype, in which its quotient is rounded anyway."""
        a, b_t = self.a, self.b.t()
        cross = ((a.to(w.dtype) @ w.t()) * b_t).sum(0)
        square = ((a @ a.t() @ b_t) * b_t).sum(0)
        return (frozen_square(w, a.dtype) + 2 * self.scale * cross + self.scale**2 * square).clamp_min(1e-24).sqrt()

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
