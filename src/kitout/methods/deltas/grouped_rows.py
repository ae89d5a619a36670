"""Rows of one batch, each through its own low-rank map, as two grouped products: one for all A, one for all B.

For GPUs, where a launch for each map costs more than its product and gathered factors read every map once per row. Rows
are put in order of their maps, so each map is read once for all of its rows. `torch._grouped_mm` wants bfloat16 and
strides of 16 bytes, so ranks are padded to 8; a row without a map is in a last group of zeros. Inference only. Measured
by `benchmarks/gpu.py`; it knows tensors and runs, and the tests run it on a CPU.
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


def can_group(x: Tensor, y: Tensor) -> bool:
    """Whether device, dtype and widths are those of the grouped product."""
    if x.device.type not in DEVICES or y.dtype != torch.bfloat16 or x.shape[-1] % MULTIPLE or y.shape[-1] % MULTIPLE:
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= CAPABILITY


def add_to_groups(
    x: Tensor,
    y: Tensor,
    rows: Sequence[int],
    maps: Callable[[], Sequence[tuple[Tensor, Tensor, float]]],
    stamp: object,
    cache: dict[Any, Any],
) -> Tensor:
    """y [B, ..., d_out], overwritten: row i plus scale * B A x of map rows[i], nothing below 0. x [B, ..., d_in].

    maps: A, B and scale of each, asked for where `stamp` is not that of the cache.
    """
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
