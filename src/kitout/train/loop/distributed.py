"""Several processes of one run: each takes its share of a list, and lists are put together again.

One process is the usual case and costs nothing. It knows torch.distributed and nothing of what is shared.
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
    """Every n-th, from one's own number on: neighbours of like length go to different processes."""
    return slices(items)[rank()]


def slices(items: Sequence[Any]) -> list[list[Any]]:
    """What `mine` gives to each process."""
    return [list(items[number :: world_size()]) for number in range(world_size())]


def all_gather(items: list[Any]) -> list[Any]:
    """What all processes hold, in the order of the processes."""
    if world_size() == 1:
        return items
    everywhere: list[Any] = [None] * world_size()
    dist.all_gather_object(everywhere, items)
    return [entry for part in everywhere for entry in part]


def barrier() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.barrier()
