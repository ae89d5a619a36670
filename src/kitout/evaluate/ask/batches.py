"""A model asked about many prompts: batches of like lengths, the longest first, smaller ones where memory runs out.

What the asking leaves is what it found: training modes, random numbers, the answers' order. Rows of ids are padded by
the mask alone, so the id that fills them may be any. It knows no tokenizer and no task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Literal, TypeVar

import torch
from torch import Tensor

from kitout.errors import ConfigError, Faults
from kitout.kit import Kit

Tell = Callable[[int, int], None]  # done, total
T = TypeVar("T")

SHOWN = 3  # faults told in full


def in_batches(
    prompts: Sequence[Sequence[int]], batch: int, ask: Callable[[list[Sequence[int]]], Sequence[T]], tell: Tell | None
) -> list[T]:
    """`ask` over batches of prompts, one result each, in the order of the prompts."""
    _check(prompts, batch)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, T] = {}
    while len(found) < len(order):
        if tell:
            tell(len(found), len(order))
        rows = order[len(found) : len(found) + batch]
        said = _tried(ask, [prompts[i] for i in rows])
        if said is None:
            batch = max(1, len(rows) // 2)
        else:
            found.update(zip(rows, said, strict=True))
    if tell:
        tell(len(order), len(order))
    return [found[i] for i in range(len(prompts))]


def _tried(ask: Callable[[list[Sequence[int]]], Sequence[T]], rows: list[Sequence[int]]) -> Sequence[T] | None:
    """None where memory ran out on more than one row; what the failed batch held is let go before the next try."""
    try:
        return ask(rows)
    except (torch.OutOfMemoryError, RuntimeError) as wrong:
        if len(rows) == 1 or not _is_full(wrong):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _is_full(wrong: RuntimeError) -> bool:
    """CUDA's own error, or what the CPU's allocator says on Linux and on Windows."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(wrong, torch.OutOfMemoryError) or any(said in str(wrong) for said in words)


def _check(prompts: Sequence[Sequence[int]], batch: int) -> None:
    faults = Faults(ConfigError, "prompts")
    if batch < 1:
        faults.add(f"batch is {batch}, expected at least 1")
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        faults.add(f"{len(empty)} have no token, the first is number {empty[0]}: leave them out")
    faults.raise_if_any()


@contextmanager
def asking(kit: Kit) -> Iterator[None]:
    """In eval mode and without gradients; afterwards every module's mode and the random state are as they were."""
    modes = [(module, module.training) for module in chain(kit.base.modules(), kit.modules())]
    devices = [kit.device] if kit.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            kit.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def padded(
    rows: Sequence[Sequence[int]], filler: int, side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask, [rows, width]."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros_like(ids)
    for row, (line, seen) in zip(rows, zip(ids, mask, strict=True), strict=True):
        real = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        line[real], seen[real] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)
