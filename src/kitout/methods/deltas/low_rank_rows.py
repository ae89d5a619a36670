"""Rows of one batch, each through its own low-rank map; while they are trained, one autograd node over all of them.

Neighboring rows of one map are a run and are read in place. Nothing is gathered, copied and put back, which would cost
more than the thin products themselves. Over plain frozen linears rows are dealt to units of one size and all go through
batched products together: maps of lower rank are padded with zeros, so neither unequal ranks nor unequal runs cost a
loop. y' = y + scale * B A x, as in `low_rank.py`; it knows tensors and runs only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from kitout.device_constants import constant
from kitout.methods.deltas.fused_low_rank import Change, Linear, own_tensor, product_operands, scaled_transpose

MOST_UNITS = 4  # per run: beyond that the factors of long runs would be read too often
RowRun = tuple[int, int, int]  # map, first row, row after the last


def find_runs(rows: Sequence[int]) -> list[RowRun]:
    """Neighbors with the same map; rows without one (below 0) belong to none."""
    runs, start = [], 0
    for number, same in groupby(rows):
        stop = start + len(list(same))
        if number >= 0:
            runs.append((number, start, stop))
        start = stop
    return runs


def are_equal_runs(runs: Sequence[RowRun], rows: int) -> bool:
    """All rows are in runs of one size, each of another map: then the products are batched."""
    sizes = {stop - start for _, start, stop in runs}
    numbers = [number for number, _, _ in runs]
    return len(sizes) == 1 and len(set(numbers)) == len(numbers) and sum(b - a for _, a, b in runs) == rows


def add_to_runs(x: Tensor, y: Tensor, runs: Sequence[RowRun], maps: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """y, overwritten and without a gradient: the rows of each run plus their map's scale * B A x. maps: A, B, scale."""
    for number, start, stop in runs:
        a, b, scale = maps[number]
        h_t = a.to(y.dtype) @ _flatten_rows(x[start:stop]).t()
        y[start:stop].view(-1, y.shape[-1]).addmm_(h_t.t(), b.to(y.dtype).t(), alpha=scale)
    return y


class EqualRunsLowRank(torch.autograd.Function):
    """x [B, ..., d_in], y [B, ..., d_out], of one dtype; y is overwritten. Every map has as many rows, in map order.

    factors: every map's A, then every map's B, all of one rank.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scales: list[float], *factors: Tensor) -> Tensor:
        count = len(scales)
        scale = constant(tuple(scales), y.device, y.dtype)[:, None, None]
        a = torch.stack(factors[:count]).to(y.dtype)  # [K, r, d_in]; one copy of all is a tenth of one of each
        b = torch.stack(factors[count:]).to(y.dtype)  # [K, d_out, r]
        x3 = x.reshape(count, -1, x.shape[-1])
        h_t = torch.bmm(a, x3.transpose(1, 2))  # [K, r, N]
        h_t = h_t.mul_(scale)
        y.view(count, -1, y.shape[-1]).baddbmm_(h_t.transpose(1, 2), b.transpose(1, 2))
        ctx.save_for_backward(x, a, b, h_t, scale)
        ctx.dtype = factors[0].dtype
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, a, b, h_t, scale = ctx.saved_tensors  # h_t with its scale
        count = len(a)
        g3, x3 = g.reshape(count, -1, g.shape[-1]), x.reshape(count, -1, x.shape[-1])
        gh_t = torch.bmm(b.transpose(1, 2), g3.transpose(1, 2)).mul_(scale)  # [K, r, N]
        gx = torch.bmm(gh_t.transpose(1, 2), a).view(x.shape) if ctx.needs_input_grad[0] else None
        ga = torch.bmm(gh_t, x3).to(ctx.dtype)
        gb = torch.bmm(h_t, g3).transpose(1, 2).to(ctx.dtype, memory_format=torch.contiguous_format)
        return gx, g, None, *ga.unbind(), *gb.unbind()


class RunsLowRank(torch.autograd.Function):
    """The same for runs of any size, with rows of no map between them, and maps of different ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, runs: list[RowRun], scales: list[float], *factors: Tensor) -> Tensor:
        low = [factor.to(y.dtype) for factor in factors]
        count = len(scales)
        hidden = []
        for number, start, stop in runs:
            y_run = y[start:stop].view(-1, y.shape[-1])
            h_t = low[number] @ _flatten_rows(x[start:stop]).t()
            y_run.addmm_(h_t.t(), low[count + number].t(), alpha=scales[number])
            hidden.append(h_t)
        ctx.save_for_backward(x, *low, *hidden)
        ctx.runs, ctx.scales, ctx.dtypes = runs, scales, [factor.dtype for factor in factors]
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        count = len(ctx.scales)
        low, hidden = saved[: 2 * count], saved[2 * count :]
        gx = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * (2 * count)
        for (number, start, stop), h_t in zip(ctx.runs, hidden, strict=True):
            g_run = _flatten_rows(g[start:stop])
            a, b, scale = low[number], low[count + number], ctx.scales[number]
            gh_t = (b.t() @ g_run.t()).mul_(scale)
            if gx is not None:
                torch.mm(gh_t.t(), a, out=gx[start:stop].view(-1, x.shape[-1]))
            for index, grad in (
                (number, gh_t @ _flatten_rows(x[start:stop])),
                (count + number, (h_t @ g_run).mul_(scale).t()),
            ):
                total = sums[index]
                sums[index] = grad if total is None else total + grad
        grads = [None if s is None else s.to(dtype) for s, dtype in zip(sums, ctx.dtypes, strict=True)]
        return gx, g, None, None, *grads


def _flatten_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class RowUnits:
    """Rows as units of one size, each of rows of one map."""

    count: int
    """Of the units."""
    maps: tuple[int, ...] | None
    """The map of each unit, the number of maps where it has none; None: every map has one unit, in their order."""

    def index(self, device: torch.device) -> Tensor | None:
        """`maps` as a tensor."""
        return None if self.maps is None else constant(self.maps, device, torch.long)

    @classmethod
    def of(cls, rows: Sequence[int], num_maps: int) -> RowUnits | None:
        """None where rows would be dealt to far more units than they have runs, or there is no row."""
        runs = find_runs([number if number >= 0 else num_maps for number in rows])
        if not runs:
            return None
        size = math.gcd(*(stop - start for _, start, stop in runs))
        count = len(rows) // size
        if count > MOST_UNITS * len(runs):
            return None
        maps = tuple(number for number, start, stop in runs for _ in range(start, stop, size))
        return cls(count, None if maps == tuple(range(num_maps)) else maps)


def fused_low_rank_rows(
    x: Tensor, units: RowUnits, linears: Sequence[Linear], changes: Sequence[Sequence[Change]]
) -> list[Tensor]:
    """The outputs of frozen linears, x [B, ..., d_in]. changes: by map, of each linear."""
    ws, biases = zip(*linears, strict=True)
    downs, ups, scales = zip(*(change for of_map in changes for change in of_map), strict=True)
    return list(_FusedLowRankRows.apply(x, units, scales, len(ws), *ws, *biases, *downs, *ups))


class _FusedLowRankRows(torch.autograd.Function):
    """The node. Over a bf16 base the products run in bf16, and the gradients of fp32 factors are fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, units: RowUnits, scales: Sequence[float], n: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        num_maps = len(scales) // n
        ws, biases, factors = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        downs, ups = factors[: len(scales)], factors[len(scales) :]
        x3 = x.reshape(units.count, -1, x.shape[-1])
        index = units.index(x.device)
        a = pad_sequence(list(downs), batch_first=True).to(x.dtype)  # [K * n, r, d_in]
        rank = a.shape[1]
        a = _of_units(a.view(num_maps, n * rank, -1), index)  # [U, n * r, d_in]
        h = torch.bmm(x3, a.transpose(1, 2))
        ys, up_ts = [], []
        for i, (w, bias) in enumerate(zip(ws, biases, strict=True)):
            up_t = pad_sequence([up.t() for up in ups[i::n]], batch_first=True)  # [K, r, d_out]
            if up_t.shape[1] < rank:
                up_t = F.pad(up_t, (0, 0, 0, rank - up_t.shape[1]))
            up_t = _of_units(up_t.mul_(_scales(scales[i::n], up_t)).to(x.dtype), index)
            y = F.linear(x, w, bias)
            y.view(units.count, -1, len(w)).baddbmm_(h[:, :, i * rank : (i + 1) * rank], up_t)
            ys.append(own_tensor(y, y.shape) if y._is_view() else y)
            up_ts.append(up_t)
        pair = product_operands(x)
        ctx.save_for_backward(*(pair or (x, None)), h, a, index, *up_ts, *ws)
        ctx.scales, ctx.ranks, ctx.dtypes = scales, [len(down) for down in downs], [each.dtype for each in factors]
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, other, h, a, index, *rest = ctx.saved_tensors
        x = x if other is None else x * other
        n, count = len(grads), len(h)
        up_ts, ws = rest[:n], rest[n:]
        num_maps, rank = len(ctx.scales) // n, up_ts[0].shape[1]
        gx: Tensor | None = None
        ghs = []
        gbs: list[Tensor | None] = [None] * len(ctx.scales)
        for i, (g, w, up_t) in enumerate(zip(grads, ws, up_ts, strict=True)):
            own_h = h[:, :, i * rank : (i + 1) * rank]
            if g is None:  # nothing came of this output
                ghs.append(torch.zeros_like(own_h))
                continue
            g3 = g.reshape(count, -1, g.shape[-1])
            ghs.append(torch.bmm(g3, up_t.transpose(1, 2)))
            gb_t = _of_maps(torch.bmm(own_h.transpose(1, 2), g3), index, num_maps)  # [K, r, d_out]
            for k in range(num_maps):
                at = k * n + i
                gbs[at] = scaled_transpose(gb_t[k, : ctx.ranks[at]], ctx.scales[at], ctx.dtypes[len(gbs) + at])
            if ctx.needs_input_grad[0]:
                g2 = g.reshape(-1, g.shape[-1])
                gx = g2 @ w if gx is None else gx.addmm_(g2, w)
        gh = ghs[0] if n == 1 else torch.cat(ghs, 2)
        ga = _of_maps(torch.bmm(gh.transpose(1, 2), x.reshape(count, -1, x.shape[-1])), index, num_maps)
        ga = ga.to(ctx.dtypes[0]).view(num_maps * n, rank, -1)
        if gx is not None:
            gx.view(count, -1, gx.shape[-1]).baddbmm_(gh, a)
            gx = gx.view(x.shape)
        gas = (ga[at, :own].to(dtype) for at, (own, dtype) in enumerate(zip(ctx.ranks, ctx.dtypes, strict=False)))
        return gx, None, None, None, *[None] * (2 * n), *gas, *gbs


def _scales(scales: Sequence[float], like: Tensor) -> Any:
    if len(set(scales)) == 1:
        return scales[0]
    return constant(tuple(scales), like.device, like.dtype)[:, None, None]


def _of_units(by_map: Tensor, index: Tensor | None) -> Tensor:
    """[K, ...] -> [U, ...]; zeros for a unit of no map."""
    return by_map if index is None else torch.cat((by_map, torch.zeros_like(by_map[:1])))[index]


def _of_maps(by_unit: Tensor, index: Tensor | None, num_maps: int) -> Tensor:
    """[U, ...] -> [K, ...], summed."""
    if index is None:
        return by_unit
    sums = by_unit.new_zeros(
        (num_maps + 1, *by_unit.shape[1:]), dtype=torch.promote_types(by_unit.dtype, torch.float32)
    )
    return sums.index_add_(0, index, by_unit.to(sums.dtype))[:num_maps]
