"""Rows of one batch, each through its own low-rank map; while they are trained, one autograd node over all of them.

Neighboring rows of one map are a run and are read in place. Nothing is gathered, copied and put back, which would cost
more than the thin products themselves. y' = y + scale * B A x, as in `low_rank.py`; it knows tensors and runs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        scale = torch.tensor(scales, dtype=y.dtype, device=y.device)[:, None, None]
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
