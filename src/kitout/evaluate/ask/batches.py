"""A function over many prompts: batches of similar lengths, the longest first, smaller ones where memory runs out.

It knows no tokenizer, no model and no task: what is computed, and in which mode, is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from kitout.base.memory import is_out_of_memory
from kitout.errors import ConfigError, Errors

ProgressFn = Callable[[int, int], None]  # done, total
T = TypeVar("T")


def map_batches(
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    ask: Callable[[list[Sequence[int]]], Sequence[T]],
    on_progress: ProgressFn | None,
) -> list[T]:
    """`ask` over batches of prompts, one result per prompt, in the order of the prompts."""
    errors = Errors(ConfigError, "prompts")
    if batch_size < 1:
        errors.add(f"batch_size is {batch_size}, expected at least 1")
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        errors.add(f"{len(empty)} have no token, the first is number {empty[0]}: leave them out")
    errors.raise_if_any()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    results: dict[int, T] = {}
    while len(results) < len(order):
        if on_progress:
            on_progress(len(results), len(order))
        batch = order[len(results) : len(results) + batch_size]
        batch_results = _try_batch(ask, [prompts[i] for i in batch])
        if batch_results is None:
            batch_size = max(1, len(batch) // 2)
        else:
            results.update(zip(batch, batch_results, strict=True))
    if on_progress:
        on_progress(len(order), len(order))
    return [results[i] for i in range(len(prompts))]


def _try_batch(ask: Callable[[list[Sequence[int]]], Sequence[T]], rows: list[Sequence[int]]) -> Sequence[T] | None:
    """None if memory ran out on more than one row; the memory of the failed batch is freed before the next try."""
    try:
        return ask(rows)
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
