"""Several processes of one run: a list is divided among them, and their lists are gathered again.

One process is the usual case and costs nothing. It knows torch.distributed and nothing of what the lists hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def my_slice(items: Sequence[Any]) -> list[Any]:
    """Every n-th item from this process's rank on, so that neighbors of like length go to different processes."""
    return slices(items)[rank()]


def slices(items: Sequence[Any]) -> list[list[Any]]:
    """What `my_slice` gives to each process."""
    return [list(items[first :: world_size()]) for first in range(world_size())]


def all_gather(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of their ranks."""
    if world_size() == 1:
        return items
    per_process: list[Any] = [None] * world_size()
    dist.all_gather_object(per_process, items)
    return [item for items in per_process for item in items]


def barrier() -> None:
    """Waits until all processes are here."""
    if world_size() > 1:
        dist.barrier()
