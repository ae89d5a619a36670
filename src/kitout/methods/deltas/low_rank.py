"""The low-rank map of LoRA: y' = y + scale * B A x, in one autograd node, and batched over rows.

Hu et al. 2021 (arXiv 2106.09685), eq. 3; A [r, d_in], B [d_out, r]. Over a bf16 base the values stay fp32 and the
products run in the base's dtype, those of few positions on a CPU in fp32 (`takes_float32`). It knows linear sites, and
embeddings and convolutions through the map of the frozen module. It knows nothing of ranks per role, of routes or of
files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout.base.weights import FrozenModule
from kitout.delta import Delta, LowRankChange, PartWeight
from kitout.methods.deltas.fused_low_rank import add_in_float32, add_low_rank, fused_low_rank, takes_float32
from kitout.methods.deltas.fusing import is_fusable, is_traced
from kitout.methods.deltas.grouped_rows import add_masked, add_to_groups, can_group, can_mask
from kitout.methods.deltas.low_rank_rows import (
    EqualRunsLowRank,
    RowUnits,
    RunsLowRank,
    add_to_runs,
    are_equal_runs,
    find_runs,
    fused_low_rank_rows,
)
from kitout.tensor_version import tensor_versions

GATHER_BYTES = 64 * 2**20  # most that one site may hold in gathered rows before the caller loops instead
# Without gradients runs of rows go one by one from this many positions of a run on: at 16 they took as long as batched
# products, at 32 0.7 to 0.8 of it, at 128 0.4 to 0.5, at 512 0.25 (rank 8, d 384 to 1024, fp32, one thread).
RUN_POSITIONS = 32
FLOAT32_POSITIONS_OF_A_ROW = 2  # up to which products with gathered factors are as fast in fp32 as in bf16 on a CPU


class LowRankDelta(Delta):
    """y' = y + scale * B A dropout(x), by the fastest product that the call allows.

    Training over a plain linear: `fused_linear`, one autograd node with the frozen product.
    One adapter elsewhere: `add_low_rank`, one autograd node where a gradient is needed.
    Embeddings and convolutions: the module's own map with B A for its weight.
    Rows of several adapters: `_add_trained_rows` in training; else runs of rows in place where they have many
    positions, and products with gathered factors where they have few.
    """

    adds_linear_map = True
    loraplus_parameters = ("b",)
    a0: Tensor | None
    b0: Tensor | None

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0, uses_module_map: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout
        self.reads_weight = uses_module_map  # embeddings and convolutions: A acts as the module's own map does
        self.register_buffer("a0", None)
        self.register_buffer("b0", None)

    def subtract_start(self, a: Tensor, b: Tensor) -> None:
        """Counts the change from this product instead of from zero (PiSSA): y' = y + scale * (B A - b a) x."""
        self.a0, self.b0 = a.clone(), b.clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole change: [r, d_in], [d_out, r], of twice the rank where a start is subtracted."""
        if self.a0 is None or self.b0 is None:
            return self.a, self.b
        return torch.cat((self.a, self.a0)), torch.cat((self.b, -self.b0), 1)

    @property
    def drops_inputs(self) -> bool:
        """Dropout is active."""
        return self.dropout > 0 and self.training

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        return self.add_change(x, y, frozen, may_overwrite=False)

    def forward_(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        return self.add_change(x, y, frozen, may_overwrite=True)

    def add_change(
        self, x: Tensor, y: Tensor, frozen: FrozenModule | None, may_overwrite: bool, weight: PartWeight = 1.0
    ) -> Tensor:
        """y + weight * scale * B A dropout(x); may_overwrite: y."""
        if x.is_floating_point() and self.drops_inputs:  # token ids have no dropout
            x = F.dropout(x, self.dropout)
        a, b = self.factors()
        if callable(weight):  # through B, where gradients reach it
            b, weight = b * weight(), 1.0
        return _add_product(x, y, a, b, weight * self.scale, frozen if self.reads_weight else None, may_overwrite)

    def fused_linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        """Both products in one autograd node, whose backward adds into the base's own input gradient."""
        if not (torch.is_grad_enabled() and self.a.requires_grad):
            return None
        if self.a0 is not None or self.drops_inputs or not is_fusable(x, w):
            return None
        return fused_low_rank(x, [(w, b)], [(self.a, self.b, self.scale)])[0]

    @classmethod
    def fused_linears(
        cls, deltas: Sequence[LowRankDelta], x: Tensor, linears: Sequence[tuple[Tensor, Tensor | None]]
    ) -> list[Tensor] | None:
        if cls is not LowRankDelta or not all(is_fusable(x, w) for w, _ in linears):
            return None
        if any(d.a0 is not None or d.drops_inputs or not d.a.requires_grad for d in deltas):
            return None
        return fused_low_rank(x, linears, [(d.a, d.b, d.scale) for d in deltas])

    @classmethod
    def fused_rows(
        cls,
        deltas: Sequence[Sequence[LowRankDelta]],
        rows: Sequence[int],
        x: Tensor,
        linears: Sequence[tuple[Tensor, Tensor | None]],
        cache: dict[str, Any],
    ) -> list[Tensor] | None:
        if cls is not LowRankDelta or not torch.is_grad_enabled() or not all(is_fusable(x, w) for w, _ in linears):
            return None
        if any(d.a0 is not None or d.drops_inputs or not d.a.requires_grad for each in deltas for d in each):
            return None
        if "units" not in cache:
            cache["units"] = RowUnits.of(rows, len(deltas))
        if x.shape[0] != len(rows) or cache["units"] is None:
            return None
        changes = [[(d.a, d.b, d.scale) for d in each] for each in deltas]
        return fused_low_rank_rows(x, cache["units"], linears, changes)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        up, down = (factor.to(w.dtype) for factor in reversed(self.factors()))
        return w + self.scale * (up @ down), b

    def low_rank_change(self) -> LowRankChange | None:
        a, b = self.factors()
        return LowRankChange(a, self.scale * b, None)

    @classmethod
    def join(cls, addends: Sequence[tuple[LowRankDelta, PartWeight]]) -> Delta | None:
        return LowRankSum(addends) if cls is LowRankDelta else None

    @classmethod
    def forward_rows(
        cls, deltas: Sequence[LowRankDelta], rows: Sequence[int], x: Tensor, y: Tensor, cache: dict[str, Any]
    ) -> Tensor | None:
        """In training one node over runs of rows; else run by run, or two batched products with every row's factors."""
        if any(d.reads_weight or (d.dropout and d.training) for d in deltas) or torch.compiler.is_compiling():
            return None  # a compiled graph cannot read the version counters of the cache
        if torch.is_grad_enabled() and any(d.a.requires_grad or d.b.requires_grad for d in deltas):
            return _add_trained_rows(deltas, rows, x, y)
        may_overwrite = not (torch.is_grad_enabled() or is_traced()) and y.is_contiguous()
        if may_overwrite and x.shape[0] == len(rows):
            maps = lambda: [(*d.factors(), d.scale) for d in deltas]  # noqa: E731
            if can_mask(x, y, len(deltas), deltas[0].a.shape[0]):
                masked = add_masked(x, y, rows, maps, _stamp(deltas, y, cache), cache)
                if masked is not None:
                    return masked
            if can_group(x, y):
                return add_to_groups(x, y, rows, maps, _stamp(deltas, y, cache), cache)
            runs = cache.setdefault("runs", find_runs(rows))
            if x.numel() >= RUN_POSITIONS * len(runs) * x.shape[-1]:
                return add_to_runs(x.to(y.dtype), y, runs, [(*d.factors(), d.scale) for d in deltas])
        dtype = torch.float32 if takes_float32(x, y, FLOAT32_POSITIONS_OF_A_ROW * x.shape[0]) else y.dtype
        if not _fill_cache(cache, deltas, rows, x.shape[-1], y, dtype):
            return None
        x3 = x.to(dtype).reshape(x.shape[0], -1, x.shape[-1])
        y3 = y.reshape(y.shape[0], -1, y.shape[-1])
        h3 = torch.bmm(x3, cache["a"])
        if dtype != y.dtype:
            change = torch.bmm(h3, cache["b"]).view(y.shape)
            return y.add_(change) if may_overwrite else (y + change).to(y.dtype)
        if may_overwrite:  # the bits of a sum beside it, without the copy
            y3.baddbmm_(h3, cache["b"])
            return y
        return torch.baddbmm(y3, h3, cache["b"]).view(y.shape)


class LowRankSum(Delta):
    """y' = y + sum_i w_i scale_i B_i A_i x as one product: every A stacked, every w_i scale_i B_i side by side.

    The factors are put together at each call: a small copy, which no way to change a value can make stale and through
    which gradients reach every part. Parts whose dropout is active are added one by one, each with its own.
    """

    adds_linear_map = True

    def __init__(self, addends: Sequence[tuple[LowRankDelta, PartWeight]]) -> None:
        super().__init__()
        self.addends = tuple(addends)  # a tuple: their values stay those of their adapters
        self.reads_weight = addends[0][0].reads_weight

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [sum of ranks, d_in], B [d_out, sum of ranks] and the scale of their product."""
        pairs = [delta.factors() for delta, _ in self.addends]
        fixed = [weight * delta.scale for delta, weight in self.addends if not callable(weight)]
        largest = max(fixed, key=abs, default=1.0) or 1.0  # one part at least, and mostly all, need no product with it
        ups = []
        for (delta, weight), (_, b) in zip(self.addends, pairs, strict=True):
            if callable(weight):
                ups.append(b * (weight() * (delta.scale / largest)))
            else:
                ups.append(b if weight * delta.scale == largest else b * (weight * delta.scale / largest))
        return torch.cat([a for a, _ in pairs]), torch.cat(ups, 1), largest

    @property
    def drops_inputs(self) -> bool:
        """Dropout is active in one of them."""
        return any(delta.drops_inputs for delta, _ in self.addends)

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        return self._add_change(x, y, frozen, may_overwrite=False)

    def forward_(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        return self._add_change(x, y, frozen, may_overwrite=True)

    def _add_change(self, x: Tensor, y: Tensor, frozen: FrozenModule | None, may_overwrite: bool) -> Tensor:
        if self.drops_inputs:
            for delta, weight in self.addends:
                y = delta.add_change(x, y, frozen, may_overwrite, weight)
                may_overwrite = True
            return y
        a, b, scale = self.factors()
        return _add_product(x, y, a, b, scale, frozen if self.reads_weight else None, may_overwrite)

    def fused_linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        has_trained = any(delta.a.requires_grad or callable(weight) for delta, weight in self.addends)
        if not (torch.is_grad_enabled() and has_trained) or self.drops_inputs or not is_fusable(x, w):
            return None
        low_a, low_b, scale = self.factors()
        return fused_low_rank(x, [(w, b)], [(low_a, low_b, scale)])[0]

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        up, down, scale = self.factors()
        return w + scale * (down.to(w.dtype) @ up.to(w.dtype)), b


def _add_product(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, frozen: FrozenModule | None, may_overwrite: bool
) -> Tensor:
    """y + scale * B A x, in the dtype of y. frozen: where A acts as the module's own map does."""
    if frozen is None and a.dtype == torch.float32 and takes_float32(x, y):
        return add_in_float32(x, y, a, b.float(), scale, may_overwrite)
    a, b = a.to(y.dtype), b.to(y.dtype)
    if x.is_floating_point():  # token ids are not
        x = x.to(y.dtype)
    if frozen is not None:
        return y + scale * frozen.apply_low_rank(x, a, b, y)
    return add_low_rank(x, y, a, b, scale, may_overwrite)


def _add_trained_rows(deltas: Sequence[LowRankDelta], rows: Sequence[int], x: Tensor, y: Tensor) -> Tensor | None:
    """One node over all rows, where neighbors have the same adapter, so that there are few runs of them."""
    runs = find_runs(rows)
    if len(runs) > 2 * len(deltas) or any(d.a0 is not None for d in deltas):
        return None
    if not y.is_contiguous() or y._is_view() or torch._C._are_functorch_transforms_active():
        return None  # y cannot be overwritten
    x = x.to(y.dtype)
    result: Tensor
    same_shape = len({(d.a.shape[0], d.a.dtype) for d in deltas}) == 1
    if same_shape and are_equal_runs(runs, len(rows)) and x.shape[0] == len(rows):
        ordered = [deltas[number] for number, _, _ in runs]
        result = EqualRunsLowRank.apply(x, y, [d.scale for d in ordered], *_factors_of(ordered))
    else:
        result = RunsLowRank.apply(x, y, runs, [d.scale for d in deltas], *_factors_of(deltas))
    return result


def _factors_of(deltas: Sequence[LowRankDelta]) -> list[Tensor]:
    return [*(d.a for d in deltas), *(d.b for d in deltas)]


def _fill_cache(
    cache: dict[str, Any],
    deltas: Sequence[LowRankDelta],
    rows: Sequence[int],
    d_in: int,
    y: Tensor,
    dtype: torch.dtype,
) -> bool:
    """Puts the factors of every row into the cache, unless they are there; False if they would take too much memory."""
    stamp = dtype, _stamp(deltas, y, cache)
    if cache.get("stamp") == stamp:
        return True
    rank = max(d.factors()[0].shape[0] for d in deltas)
    if len(rows) * rank * (d_in + y.shape[-1]) * dtype.itemsize > GATHER_BYTES:
        return False
    cache["a"], cache["b"] = _gather_factors(deltas, rows, rank, dtype)
    cache["stamp"] = stamp
    return True


def _stamp(deltas: Sequence[LowRankDelta], y: Tensor, cache: dict[str, Any]) -> tuple[object, ...]:
    """Changes when a value does. Read at every site and call: all at once, in a fifth of the time for 64."""
    own = cache.setdefault("parameters", [d._parameters for d in deltas])
    values = [value for parameters in own for value in parameters.values() if value is not None]
    is_known = len(values) == 2 * len(deltas)  # of a parametrized value nothing is known
    return y.dtype, y.device, tensor_versions(values) if is_known else object()


def _gather_factors(
    deltas: Sequence[LowRankDelta], rows: Sequence[int], rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Per row A^T [n, d_in, rank] and scale * B^T [n, rank, d_out]; zeros for a row without an adapter."""
    with torch.inference_mode(False), torch.no_grad():
        pairs = [d.factors() for d in deltas]
        a = torch.stack([F.pad(p, (0, 0, 0, rank - p.shape[0])) for p, _ in pairs]).to(dtype)
        b = torch.stack([F.pad(d.scale * p, (0, rank - p.shape[1])) for d, (_, p) in zip(deltas, pairs, strict=True)])
        b = b.to(dtype)
        a = torch.cat((a, torch.zeros_like(a[:1]))).transpose(1, 2).contiguous()
        b = torch.cat((b, torch.zeros_like(b[:1]))).transpose(1, 2).contiguous()
        index = torch.tensor(rows, device=a.device) % (len(deltas) + 1)  # -1 becomes the last one: zeros
        return a[index], b[index]
