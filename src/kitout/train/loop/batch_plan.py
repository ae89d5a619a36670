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


def steps_of(examples: int, batch: int, epochs: float) -> int:
    """Optimiser steps of so many passes."""
    return max(1, round(epochs * examples / batch))


def plan(
    sizes: Sequence[int], batch: int, steps: int, seed: int, grouped: bool = True,
    sets: Sequence[range] | None = None, weights: Sequence[float] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The indices of every step, longest first within a step. sets: the parts of a mixture, as ranges of indices."""
    dice = random.Random(seed)
    parts = list(sets) if sets else [range(len(sizes))]
    if not all(parts):
        raise ConfigError(f"a training set without an example: found sets of {[len(part) for part in parts]}")
    stream = _mixed(parts, list(weights) if weights else [1.0] * len(parts), dice)
    batches: list[list[int]] = []
    while len(batches) < steps:
        pool = [next(stream) for _ in range(batch * min(POOL, steps - len(batches)))]
        if grouped:
            pool.sort(key=lambda i: sizes[i])  # stable: equal lengths keep their drawn order
        cut = [pool[at : at + batch] for at in range(0, len(pool), batch)]
        if grouped:
            dice.shuffle(cut)
        batches += [sorted(rows, key=lambda i: -sizes[i]) for rows in cut]
    return batches


def _mixed(parts: Sequence[range], weights: Sequence[float], dice: random.Random) -> Iterator[int]:
    """Without end: each part shuffled epoch after epoch, chosen by weight times size."""
    streams = [_epochs(part, random.Random(dice.random())) for part in parts]
    shares = [weight * len(part) for weight, part in zip(weights, parts, strict=True)]
    while True:
        chosen = dice.choices(range(len(parts)), shares)[0] if len(parts) > 1 else 0
        yield next(streams[chosen])


def _epochs(part: range, dice: random.Random) -> Iterator[int]:
    while True:
        order = list(part)
        dice.shuffle(order)
        yield from order
