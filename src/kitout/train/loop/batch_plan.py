"""The order of a run: which examples each optimiser step takes, all of it settled before the first one by the seed.

Epochs are shuffled one after the other; a mixture draws from each set by its weight; batches of like lengths are cut
from pools and come in random order. So a resumed run only has to know how many steps are done. It knows lengths and
indices, and nothing of what lies behind them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from kitout.errors import ConfigError

POOL = 32  # batches sorted by length together


def num_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Optimiser steps of so many passes."""
    return max(1, round(epochs * num_examples / batch_size))


def plan_batches(
    sizes: Sequence[int], batch_size: int, num_steps: int, seed: int, group_by_length: bool = True,
    ranges: Sequence[range] | None = None, weights: Sequence[float] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The indices of every step, longest first within a step. sets: the parts of a mixture, as ranges of indices."""
    dice = random.Random(seed)
    parts = list(ranges) if ranges else [range(len(sizes))]
    if not all(parts):
        raise ConfigError(f"a training set without an example: found sets of {[len(part) for part in parts]}")
    stream = _mixture_indices(parts, list(weights) if weights else [1.0] * len(parts), dice)
    batches: list[list[int]] = []
    while len(batches) < num_steps:
        pool = [next(stream) for _ in range(batch_size * min(POOL, num_steps - len(batches)))]
        if group_by_length:
            pool.sort(key=lambda i: sizes[i])  # stable: equal lengths keep their drawn order
        cut = [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
        if group_by_length:
            dice.shuffle(cut)
        batches += [sorted(rows, key=lambda i: -sizes[i]) for rows in cut]
    return batches


def _mixture_indices(ranges: Sequence[range], weights: Sequence[float], rng: random.Random) -> Iterator[int]:
    """Without end: each part shuffled epoch after epoch, chosen by weight times size."""
    streams = [_shuffled_epochs(part, random.Random(rng.random())) for part in ranges]
    shares = [weight * len(part) for weight, part in zip(weights, ranges, strict=True)]
    while True:
        chosen = rng.choices(range(len(ranges)), shares)[0] if len(ranges) > 1 else 0
        yield next(streams[chosen])


def _shuffled_epochs(indices: range, rng: random.Random) -> Iterator[int]:
    while True:
        order = list(indices)
        rng.shuffle(order)
        yield from order
