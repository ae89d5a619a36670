"""The order of a run: which examples each optimizer step takes, fixed by the seed before the first step.

Epochs are shuffled one after the other. A mixture samples each dataset by its weight. Batches of like lengths are cut
from pools and come in random order. So a resumed run only has to know how many steps are done. It knows lengths and
indices, and nothing of the examples behind them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from kitout.errors import ConfigError

BATCHES_PER_POOL = 32  # sorted by length together


def num_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of so many epochs."""
    return max(1, round(epochs * num_examples / batch_size))


def plan_batches(
    sizes: Sequence[int], batch_size: int, num_steps: int, seed: int, group_by_length: bool = True,
    ranges: Sequence[range] | None = None, weights: Sequence[float] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The indices of every step, longest first within a step. ranges: of the datasets of a mixture; default all one."""
    rng = random.Random(seed)
    ranges = list(ranges) if ranges else [range(len(sizes))]
    if not all(ranges):
        raise ConfigError(f"a training set has no examples; sizes: {[len(indices) for indices in ranges]}")
    stream = _mixture_indices(ranges, list(weights) if weights else [1.0] * len(ranges), rng)
    batches: list[list[int]] = []
    while len(batches) < num_steps:
        pool = [next(stream) for _ in range(batch_size * min(BATCHES_PER_POOL, num_steps - len(batches)))]
        if group_by_length:
            pool.sort(key=lambda i: sizes[i])  # stable: equal lengths keep their random order
        new_batches = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        if group_by_length:
            rng.shuffle(new_batches)
        batches += [sorted(rows, key=lambda i: -sizes[i]) for rows in new_batches]
    return batches


def _mixture_indices(ranges: Sequence[range], weights: Sequence[float], rng: random.Random) -> Iterator[int]:
    """Without end: each dataset shuffled epoch after epoch, sampled by weight times size."""
    streams = [_shuffled_epochs(indices, random.Random(rng.random())) for indices in ranges]
    probabilities = [weight * len(indices) for weight, indices in zip(weights, ranges, strict=True)]
    while True:
        which = rng.choices(range(len(ranges)), probabilities)[0] if len(ranges) > 1 else 0
        yield next(streams[which])


def _shuffled_epochs(indices: range, rng: random.Random) -> Iterator[int]:
    while True:
        order = list(indices)
        rng.shuffle(order)
        yield from order
