"""Low-rank changes in one autograd node: of frozen linears that read one tensor with their products, and of any output.

y_i = x W_i^T + b_i + scale_i (x A_i^T) B_i^T. Every A is multiplied with x at once, forward and backward, and one
product after another adds into one input gradient: no temporary of its size. Every thin product has its few columns
last, which on CPUs is 1.1 to 2.5 times as fast as the other way round from 64 positions on (rank 8 to 32, MKL and
oneDNN, fp32 and bf16). It knows nothing of Deltas, dropout or routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kitout import fast
from kitout.methods.deltas.fusing import is_traced, product_to, scaled_to

# What tells whether hooks act on saved tensors: from torch 2.8 on.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

# Of few positions products in bf16 take two to four times as long as in fp32 on CPUs, because oneDNN prepares each: one
# to 16 positions 41 to 46 us against 10 to 31 (rank 8, d 576 to 1536).
FLOAT32_POSITIONS = 16

Linear = tuple[Tensor, Tensor | None]  # weight [d_out, d_in], bias
Change = tuple[Tensor, Tensor, float]  # A [r, d_in], B [d_out, r], scale


def fused_low_rank(x: Tensor, linears: Sequence[Linear], changes: Sequence[Change]) -> list[Tensor]:
    """The outputs of frozen linears with their changes."""
    ws, biases = zip(*linears, strict=True)
    downs, ups, scales = zip(*changes, strict=True)
    return list(_FusedLowRank.apply(x, scales, *ws, *biases, *downs, *ups))


def own_tensor(y: Tensor, shape: torch.Size) -> Tensor:
    """A fresh result in a shape, not as a view of it: models may write to what a projection returned, and autograd
    lets nobody write to a view that was made inside a node. Nothing else holds the result, so the memory is shared.
    """
    result: Tensor = torch.ops.aten._unsafe_view(y, shape)
    return result


class _FusedLowRank(torch.autograd.Function):
    """The node. Over a bf16 base the products run in bf16, and the gradients of fp32 factors are fp32.

    The scales are in A, so that h has them for the gradients of B; few calls in all, because on a GPU a small batch
    waits for the calls.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(scales)
        ws, biases, downs, ups = (tensors[i * n : (i + 1) * n] for i in range(4))
        ranks = [len(down) for down in downs]
        x2 = x.reshape(-1, x.shape[-1])
        a = _scaled(downs, scales, x.dtype)
        # B^T, contiguous as [r, d_out]: of the layouts the only one that both products with it run fast in on a CPU.
        up_ts = [transposed(b, x.dtype) for b in ups]
        h = F.linear(x2, a)
        ys = []
        for w, bias, up_t, own_h in zip(ws, biases, up_ts, _columns(h, ranks), strict=True):
            y = F.linear(x, w, bias)
            y.view(-1, y.shape[-1]).addmm_(own_h, up_t)
            ys.append(own_tensor(y, y.shape) if y._is_view() else y)
        pair = product_operands(x)
        ctx.save_for_backward(*(pair or (x, None)), h, a, *up_ts, *ws)
        ctx.scales, ctx.ranks, ctx.dtypes = scales, ranks, [factor.dtype for factor in (*downs, *ups)]
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, other, h, a, *rest = ctx.saved_tensors
        x = x if other is None else x * other
        n, needs_x = len(grads), ctx.needs_input_grad[0]
        up_ts, ws = rest[:n], rest[n:]
        g2s = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        ghs: list[Tensor] = []
        gbs: list[Tensor | None] = []
        for g2, up_t, own_h, dtype in zip(g2s, up_ts, _columns(h, ctx.ranks), ctx.dtypes[n:], strict=True):
            if g2 is None:  # nothing came of this output
                ghs.append(torch.zeros_like(own_h))
                gbs.append(None)
            else:
                ghs.append(F.linear(g2, up_t))
                gbs.append(_up_gradient(own_h, g2, dtype))
        gh = ghs[0] if n == 1 else torch.cat(ghs, 1)
        gas = _down_gradients(gh, x.reshape(-1, x.shape[-1]), ctx.scales, ctx.ranks, ctx.dtypes[:n])
        gx: Tensor | None = None
        if needs_x:
            gx = gh @ a
            for g2, w in zip(g2s, ws, strict=True):
                if g2 is not None:
                    gx.addmm_(g2, w)
            gx = gx.view(x.shape)
        return gx, None, *[None] * (2 * n), *gas, *gbs


def _columns(h: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
    return [h] if len(ranks) == 1 else h.split(ranks, 1)


def _scaled(downs: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Every scale * A, one below the other."""
    if len(set(scales)) > 1:
        return torch.cat([down * scale for down, scale in zip(downs, scales, strict=True)]).to(dtype)
    return scaled_to(downs[0] if len(downs) == 1 else torch.cat(list(downs)), scales[0], dtype)


def _down_gradients(
    gh: Tensor, x2: Tensor, scales: Sequence[float], ranks: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Of every A, gh^T x: h is x times scale * A."""
    if len(set(scales)) == 1 and len(set(dtypes)) == 1:
        return list(_rows(product_to(gh.t(), x2, dtypes[0]).mul_(scales[0]), ranks))
    parts = zip(_rows(gh.t() @ x2, ranks), scales, dtypes, strict=True)
    return [part.to(dtype) * scale for part, scale, dtype in parts]


def _up_gradient(h: Tensor, g2: Tensor, dtype: torch.dtype) -> Tensor:
    """Of B, g^T h, contiguous: no gradient in another layout, which autograd would copy."""
    if g2.is_cpu:
        return transposed(h.t() @ g2, dtype)
    return product_to(g2.t(), h, dtype)


def _rows(ga: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
    return [ga] if len(ranks) == 1 else ga.split(ranks)


def transposed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t^T in a dtype, contiguous: no gradient in another layout, which autograd would copy."""
    if t.dtype == dtype:
        return t.t().clone(memory_format=torch.contiguous_format)
    return t.t().to(dtype, memory_format=torch.contiguous_format)


def scaled_transpose(t: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * t^T, contiguous: no gradient in another layout, which autograd would copy."""
    return torch.mul(t.t(), scale, out=torch.empty(t.shape[::-1], dtype=dtype, device=t.device))


def product_operands(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The two tensors that x is the product of, where the graph keeps both anyway (a gate): then the product, of their
    size, need not be kept as well, and is taken once more, bit for bit.
    """
    node: Any = x.grad_fn
    if type(node).__name__ != "MulBackward0" or _saved_tensors_hooks is None or _saved_tensors_hooks(True) is not None:
        return None  # behind hooks (checkpointing, offloading) nothing is kept as it is
    try:
        first, second = node._saved_self, node._saved_other
    except RuntimeError:  # written to since
        return None
    return None if first is None or second is None or second.ndim == 0 else (first, second)


def takes_float32(x: Tensor, y: Tensor, most: int = FLOAT32_POSITIONS) -> bool:
    """Products of the input x that are added to y are faster, and more exact, in float32. most: positions of x."""
    if is_traced() or torch.is_grad_enabled() or y.dtype not in (torch.bfloat16, torch.float16):
        return False  # asked first: a traced shape that is read becomes a condition of its graph
    if y.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not fast.enabled():
        return False
    return x.numel() <= most * x.shape[-1]


def add_in_float32(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, may_overwrite: bool) -> Tensor:
    """`add_low_rank` with a and b in float32, for few positions of a half-precision y."""
    change = F.linear(F.linear(x.float(), a), b).mul_(scale)
    if may_overwrite and not y._is_view() and y.is_contiguous():
        return y.add_(change)
    return (y + change).to(y.dtype)


def add_low_rank(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, may_overwrite: bool) -> Tensor:
    """y + scale * (x a^T) b^T, all of one dtype; may_overwrite: y."""
    if is_traced() or not fast.enabled():
        return y + scale * F.linear(F.linear(x, a), b)
    may_overwrite = may_overwrite and not y._is_view() and y.is_contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, a, b)):
        result: Tensor = _AddLowRank.apply(x, y, a, b, scale, may_overwrite)
        return result
    return _add_up_projection(_project_down(x, a), y, b, scale, may_overwrite)


def _project_down(x: Tensor, a: Tensor) -> Tensor:
    """(x a^T)^T, [r, N]: with the long axis last, products with a handful of rows run 2 to 10 times faster on CPUs."""
    return a @ x.reshape(-1, x.shape[-1]).t()


def _add_up_projection(h_t: Tensor, y: Tensor, b: Tensor, scale: float, may_overwrite: bool) -> Tensor:
    y2 = y.reshape(-1, y.shape[-1])
    if may_overwrite:
        y2.addmm_(h_t.t(), b.t(), alpha=scale)
        return y
    return own_tensor(torch.addmm(y2, h_t.t(), b.t(), alpha=scale), y.shape)


class _AddLowRank(torch.autograd.Function):
    """y + scale * (x a^T) b^T as one node, y written in place, every thin product in its fast orientation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, may_overwrite: bool) -> Tensor:
        h_t = _project_down(x, a)
        ctx.save_for_backward(x, h_t, a, b)
        ctx.scale = scale
        if may_overwrite:
            ctx.mark_dirty(y)
        return _add_up_projection(h_t, y, b, scale, may_overwrite)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h_t, a, b = ctx.saved_tensors
        gh_t, ga, gb = _factor_grads(g, x, h_t, b, ctx.scale)
        gx = (gh_t.t() @ a).view(x.shape) if ctx.needs_input_grad[0] else None
        return gx, g, ga, gb, None, None


def _factor_grads(g: Tensor, x: Tensor, h_t: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x a^T)^T [r, N], of a and of b."""
    g2 = g.reshape(-1, g.shape[-1])
    gh_t = (b.t() @ g2.t()).mul_(scale)
    return gh_t, gh_t @ x.reshape(-1, x.shape[-1]), (h_t @ g2).mul_(scale).t()
