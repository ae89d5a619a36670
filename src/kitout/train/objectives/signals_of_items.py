"""An objective's examples as batches of `kitout.signals`: its loss per target, and the positions that it trains on.

It knows the objective's interface and the names of a batch's targets, and nothing of sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kitout.base.select import word_for
from kitout.data.encode.item import IGNORE_INDEX
from kitout.errors import ConfigError
from kitout.kit import Kit
from kitout.method import Method
from kitout.signals.collect import collect_signals
from kitout.signals.site_signals import Signals
from kitout.train.objectives.objective import Batch, Objective, StepObjective

BATCH_SIZE = 8
NUM_ITEMS = 256  # that a pass looks at, unless more are asked for


def signals_of_items(
    kit: Kit, objective: Objective, items: Sequence[Any], batch_size: int = BATCH_SIZE, **options: Any
) -> Signals:
    """`collect_signals` over these items, in order. Each batch's loss is the mean over its targets."""
    if isinstance(objective, StepObjective):
        raise ConfigError(
            f"signals: the losses of {type(objective).__name__} need a whole training step: give loss=..."
        )
    batches: list[Batch] = []
    num_targets: dict[int, int] = {}
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        targets = sum(map(objective.num_targets, part))
        if targets:
            batches.append(objective.collate(part, None))
            num_targets[id(batches[-1])] = targets
    if not batches:
        raise ConfigError(f"signals: none of the {len(items)} examples has a target")

    def loss(model: Kit, batch: Batch) -> Tensor:
        weights = torch.full((batch.num_examples,), 1.0 / num_targets[id(batch)], device=model.device)
        return objective.losses(model, batch, weights).total

    return collect_signals(kit, batches, loss, **{"positions": trained_positions, **options})


def first_items(examples: Sequence[Any], batches: Sequence[Sequence[int]], num_items: int) -> list[Any]:
    """The examples of the first steps, each once."""
    indices = dict.fromkeys(islice((i for step in batches for i in step), num_items))
    return [examples[i] for i in indices]


def start_from_items(
    kit: Kit, name: str, method: Method, objective: Objective, items: Sequence[Any], seed: int
) -> None:
    """The adapter anew with the start that its method takes from data; it was added without one. Its heads stay."""
    if objective.task == "pairs":
        raise ConfigError(
            f"method.init of {name}: the start comes from examples with answers, which this stage makes only while it "
            "trains: train the adapter before, and continue it with train.from"
        )
    adapter = kit[name]
    heads = adapter.heads_by_path()
    paths = {site.path for site in adapter.sites if site.kind == "linear" and site.layer is not None}
    options: dict[str, Any] = {"targets": " ".join(map(word_for, paths))} if paths else {}
    options |= method.start_options(adapter.sites)
    signals = signals_of_items(kit, objective, items, heads=heads, seed=seed, **options)
    kit.remove(name)
    kit.add(name, method, seed=seed, heads=heads, start=signals)


def trained_positions(batch: Batch) -> list[Tensor]:
    """Where a token is predicted from or has a class; all but padding where the answer is of the whole text."""
    masks = []
    ids = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))
    labels = batch.targets.get("labels")
    if ids is not None and "positions" in batch.targets:
        mask = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
        mask[batch.targets["positions"]] = True
        masks.append(mask.view(ids.shape))
    elif ids is not None and labels is not None and labels.shape == ids.shape:
        masks.append(labels != IGNORE_INDEX)
    if "attention_mask" in batch.inputs:
        masks.append(batch.inputs["attention_mask"].bool())
    return masks
