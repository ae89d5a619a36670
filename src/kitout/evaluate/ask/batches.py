"""A model asked about many prompts: batches of like lengths, the longest first, smaller ones where memory runs out.

It knows no tokenizer, no model and no task: what is asked, and in which mode, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from kitout.base.memory import is_out_of_memory
from kitout.errors import ConfigError, Errors

ProgressFn = Callable[[int, int], None]  # done, total
T = TypeVar("T")

MAX_SHOWN_ERRORS = 3  # faults told in full


def map_batches(
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    ask: Callable[[list[Sequence[int]]], Sequence[T]],
    on_progress: ProgressFn | None,
) -> list[T]:
    """`ask` over batches of prompts, one result each, in the order of the prompts."""
    _check_prompts(prompts, batch_size)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, T] = {}
    while len(found) < len(order):
        if on_progress:
            on_progress(len(found), len(order))
        rows = order[len(found) : len(found) + batch_size]
        said = _try_batch(ask, [prompts[i] for i in rows])
        if said is None:
            batch_size = max(1, len(rows) // 2)
        else:
            found.update(zip(rows, said, strict=True))
    if on_progress:
        on_progress(len(order), len(order))
    return [found[i] for i in range(len(prompts))]


def _try_batch(ask: Callable[[list[Sequence[int]]], Sequence[T]], rows: list[Sequence[int]]) -> Sequence[T] | None:
    """None where memory ran out on more than one row; what the failed batch held is let go before the next try."""
    try:
        return ask(rows)
    except (RuntimeError, MemoryError) as wrong:
        if len(rows) == 1 or not is_out_of_memory(wrong):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _check_prompts(prompts: Sequence[Sequence[int]], batch_size: int) -> None:
    faults = Errors(ConfigError, "prompts")
    if batch_size < 1:
        faults.add(f"batch is {batch_size}, expected at least 1")
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        faults.add(f"{len(empty)} have no token, the first is number {empty[0]}: leave them out")
    faults.raise_if_any()
