"""Rows of one batch, each through its own low-rank map, as two products: one for all A, one for all B.

For GPUs, where a launch for each map costs more than its product and gathered factors read every map once per row.
Few positions, as in decoding: every position goes through all maps side by side, and what other maps gave is set to
zero between the products. More of them: rows are put in order of their maps and multiplied in groups;
`torch._grouped_mm` wants bfloat16 and strides of 16 bytes, so ranks are padded to 8, and a row without a map is in a
last group of zeros. Inference only. Measured by `benchmarks/gpu.py`; it knows tensors, and the tests run it on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 8  # bfloat16 values in 16 bytes
DEVICES = ("cuda",)
CAPABILITY = (9, 0)  # of a GPU: older ones have no grouped product of their own
# Of both products with all maps, up to which they are taken: some 10 us at half of an H100's peak, where one kernel of
# grouped products took 13 us for 8 groups and 40 us for 64.
MASKED_OPERATIONS = 4e9
Maps = Callable[[], Sequence[tuple[Tensor, Tensor, float]]]  # A, B and scale of each; asked for where they have changed


def can_mask(x: Tensor, y: Tensor, num_maps: int, rank: int) -> bool:
    """Whether products with all maps cost little enough. rank: of the maps, about."""
    if x.device.type not in DEVICES:
        return False
    return 2 * x.numel() // x.shape[-1] * num_maps * rank * (x.shape[-1] + y.shape[-1]) <= MASKED_OPERATIONS


def can_group(x: Tensor, y: Tensor) -> bool:
    """Whether device, dtype and widths are those of the grouped product."""
    if x.device.type not in DEVICES or y.dtype != torch.bfloat16 or x.shape[-1] % MULTIPLE or y.shape[-1] % MULTIPLE:
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= CAPABILITY


def add_masked(
    x: Tensor, y: Tensor, rows: Sequence[int], maps: Maps, stamp: object, cache: dict[str, Any]
) -> Tensor | None:
    """y [B, ..., d_out], overwritten: row i plus scale * B A x of map rows[i], nothing below 0. x [B, ..., d_in].

    None where some value of the maps is not finite: times zero it would reach every row.
    """
    if cache.get("side by side stamp") != stamp:
        cache["side by side"] = _side_by_side(maps(), rows, y)
        cache["side by side stamp"] = stamp
    a, b, of_others = cache["side by side"]
    if a is None:
        return None
    h = F.linear(x.to(y.dtype).reshape(len(rows), -1, x.shape[-1]), a).masked_fill_(of_others, 0.0)
    y.view(-1, y.shape[-1]).addmm_(h.flatten(0, 1), b)
    return y


def add_to_groups(
    x: Tensor, y: Tensor, rows: Sequence[int], maps: Maps, stamp: object, cache: dict[Any, Any]
) -> Tensor:
    """The same map by groups of rows."""
    if cache.get("group stamp") != stamp:
        cache["groups"] = _stack_factors(maps(), y)
        cache["group stamp"] = stamp
    a, b = cache["groups"]
    x3, y3 = x.to(y.dtype).reshape(len(rows), -1, x.shape[-1]), y.view(len(rows), -1, y.shape[-1])
    positions = x3.shape[1]
    if "order" not in cache:
        cache["order"] = _order_rows(rows, len(a) - 1, y.device)
    order, row_ends = cache["order"]
    if ("ends", positions) not in cache:
        cache["ends", positions] = (row_ends * positions).to(torch.int32)
    ends = cache["ends", positions]
    h = torch._grouped_mm(x3[order].flatten(0, 1), a, offs=ends)
    change = torch._grouped_mm(h, b, offs=ends)
    y3.index_add_(0, order, change.view(y3.shape))
    return y


def _side_by_side(
    maps: Sequence[tuple[Tensor, Tensor, float]], rows: Sequence[int], y: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """A [sum of ranks, d_in], None where a value is not finite; scale * B^T [sum of ranks, d_out]; and by row which of
    the ranks are not its map's [B, 1, sum of ranks].
    """
    with torch.inference_mode(False), torch.no_grad():
        ranks = [a.shape[0] for a, _, _ in maps]
        pad = -sum(ranks) % MULTIPLE
        a = F.pad(torch.cat([a for a, _, _ in maps]).to(y.dtype), (0, 0, 0, pad))
        b = F.pad(torch.cat([scale * b.t() for _, b, scale in maps]).to(y.dtype), (0, 0, 0, pad))
        owner = torch.tensor([n for n, rank in enumerate(ranks) for _ in range(rank)] + [len(ranks)] * pad)
        of_others = (torch.tensor(rows)[:, None] != owner)[:, None].to(y.device)
        is_finite = bool(a.isfinite().all() & b.isfinite().all())
        return a if is_finite else None, b, of_others


def _order_rows(rows: Sequence[int], num_maps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers in order of their maps, those without one last; and where the rows of each map end."""
    with torch.inference_mode(False):
        numbers = torch.tensor([number if number >= 0 else num_maps for number in rows])
        counts = torch.bincount(numbers, minlength=num_maps + 1)
        return numbers.argsort(stable=True).to(device), counts.cumsum(0).to(device)


def _stack_factors(maps: Sequence[tuple[Tensor, Tensor, float]], y: Tensor) -> tuple[Tensor, Tensor]:
    """A^T [K + 1, d_in, rank] and scale * B^T [K + 1, rank, d_out], the last of zeros."""
    with torch.inference_mode(False), torch.no_grad():
        rank = max(a.shape[0] for a, _, _ in maps)
        rank += -rank % MULTIPLE
        ups = [F.pad(a.t(), (0, rank - a.shape[0])) for a, _, _ in maps]
        downs = [F.pad(scale * b.t(), (0, 0, 0, rank - b.shape[1])) for _, b, scale in maps]
        a, b = (torch.stack([*same, torch.zeros_like(same[0])]).to(y.dtype).contiguous() for same in (ups, downs))
        return a, b
