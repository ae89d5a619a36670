"""`kitout.search.signals`: what batches say about the linear sites of a kit, with a loss of any kind.

A loss function, an objective of `kitout.train` with its items, or nothing for batches that hold their labels. The pass
itself is in `kitout.signals`. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kitout.kit import Kit
from kitout.signals.collect import LossFn, collect_signals
from kitout.signals.own_loss import own_loss, own_positions
from kitout.signals.site_signals import Signals
from kitout.train.objectives.objective import Objective
from kitout.train.objectives.signals_of_items import BATCH_SIZE, signals_of_items


def signals(
    kit: Kit,
    batches: Iterable[Any],
    loss: LossFn | None = None,
    *,
    objective: Objective | None = None,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> Signals:
    """One pass over batches with probes at every linear site; nothing is updated, and the model stays as it was.

    loss: (kit, batch) -> a number with its gradient; None: the model's own loss of batches that are mappings with
    labels. objective: in place of a loss, an objective of a training run; `batches` are its items then, batch_size of
    them in a forward. options: those of `kitout.signals.collect.collect_signals`: positions, heads, targets, layers,
    rank, directions, gora, loraga, seed, gradient_bytes, on_batch.
    """
    if objective is not None:
        return signals_of_items(kit, objective, list(batches), batch_size, **options)
    options.setdefault("positions", own_positions)
    return collect_signals(kit, list(batches), loss or own_loss, **options)
