"""A model asked about many prompts: batches of like lengths, the longest first, smaller ones where memory runs out.

It knows no tokenizer, no model and no task: what is asked, and in which mode, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from kitout.base.memory import is_out_of_memory
from kitout.errors import ConfigError, Faults

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
    except (RuntimeError, MemoryError) as wrong:
        if len(rows) == 1 or not is_out_of_memory(wrong):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _check(prompts: Sequence[Sequence[int]], batch: int) -> None:
    faults = Faults(ConfigError, "prompts")
    if batch < 1:
        faults.add(f"batch is {batch}, expected at least 1")
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        faults.add(f"{len(empty)} have no token, the first is number {empty[0]}: leave them out")
    faults.raise_if_any()
