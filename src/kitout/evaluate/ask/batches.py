"""A function over many prompts: batches of similar lengths, the longest first, smaller ones where memory runs out.

A batch ends at a number of prompts, or of tokens with their padding. It knows no tokenizer, no model and no task: what
is computed, and in which mode, is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import TypeVar

import torch

from kitout.base.memory import is_out_of_memory
from kitout.errors import ConfigError, Errors

MIN_RATIO, ENOUGH_TOKENS = 0.75, 256
ProgressFn = Callable[[int, int], None]  # done, total
P = TypeVar("P", bound=Sized)
T = TypeVar("T")


def map_batches(
    prompts: Sequence[P],
    batch_size: int,
    ask: Callable[[list[P]], Sequence[T]],
    on_progress: ProgressFn | None,
    max_tokens: int | None = None,
) -> list[T]:
    """`ask` over batches of prompts, one result per prompt, in the order of the prompts.

    A prompt is whatever has a length in tokens. max_tokens: of a batch, its padding included; one prompt may have more.
    Such a batch also ends where prompts get much shorter (`num_alike`).
    """
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
        if max_tokens is not None:
            batch = batch[: num_alike([len(prompts[i]) for i in batch], max_tokens)]
        batch_results = _try_batch(ask, [prompts[i] for i in batch])
        if batch_results is None:
            batch_size = max(1, len(batch) // 2)
        else:
            results.update(zip(batch, batch_results, strict=True))
    if on_progress:
        on_progress(len(order), len(order))
    return [results[i] for i in range(len(prompts))]


def num_alike(lengths: Sequence[int], max_tokens: int) -> int:
    """How many of these, the longest first, go together: within max_tokens with padding, but always one.

    Once there are ENOUGH_TOKENS, the next one is shorter than MIN_RATIO of the first only in a batch of its own.
    """
    longest = lengths[0]
    for number, length in enumerate(lengths):
        is_uneven = number * longest >= ENOUGH_TOKENS and length < MIN_RATIO * longest
        if number and ((number + 1) * longest > max_tokens or is_uneven):
            return number
    return len(lengths)


def _try_batch(ask: Callable[[list[P]], Sequence[T]], rows: list[P]) -> Sequence[T] | None:
    """None if memory ran out on more than one row; the memory of the failed batch is freed before the next try."""
    try:
        return ask(rows)
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
