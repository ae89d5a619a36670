"""Notices an adapter that runs, gets gradients and never moves: a trainer was given the bare model, whose parameters
are all frozen, in the place of the kit.

A training forward notes its adapters, which costs one comparison from the second one on. Optimizer steps are seen by
one hook for the process, torch's own global one, which does nothing while no adapter is open. It is never removed: that
would break a step of another optimizer that is going through its hooks. It knows no trainer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from kitout.runtime.adapter import Adapter

_open_watches: WeakSet[TrainingWatch] = WeakSet()  # with adapters of which it is not known yet


class TrainingWatch:
    """The adapters of one kit that have been in a training forward, until an optimizer is known to hold them or not."""

    def __init__(self) -> None:
        self.programs: object = None
        """The programs of the last training forward: with the same, there is nothing new to note."""
        self._open: WeakSet[Adapter] = WeakSet()
        self._decided: WeakSet[Adapter] = WeakSet()
        self._sums: WeakKeyDictionary[Adapter, list[float]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingWatch, ()  # a copy of a kit is trained by another optimizer

    def note(self, programs: object, adapters: Iterable[Adapter]) -> None:
        """A training forward has begun under these programs."""
        self.programs = programs
        trained = [a for a in adapters if a not in self._decided and any(p.requires_grad for p in a.parameters())]
        self._open.update(trained)
        if trained:
            _register_hook()
            _open_watches.add(self)

    @property
    def is_open(self) -> bool:
        """Some adapter has been in a training forward, and no optimizer is known to hold it or not."""
        return bool(self._open)

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has made a step: adapters that it holds are trained, the others are given two steps."""
        parameters_held = [p for group in optimizer.param_groups for p in group["params"]]
        held = {id(p) for p in parameters_held}
        moves_others = any(p.grad is not None for p in parameters_held)  # then it was not meant for these adapters
        for adapter in list(self._open):
            parameters = [p for p in adapter.parameters() if p.requires_grad]
            is_held = any(id(p) in held for p in parameters)
            if not is_held and (moves_others or all(p.grad is None for p in parameters)):
                continue  # this step was of something else
            sums = [] if is_held else [float(p.detach().double().sum()) for p in parameters]
            if not is_held and adapter not in self._sums:
                self._sums[adapter] = sums
                continue
            self._decided.add(adapter)
            self._open.discard(adapter)
            if not is_held and self._sums.pop(adapter) == sums:
                warnings.warn(
                    f"the active adapter {adapter.name!r} gets gradients, but after two optimizer steps its values "
                    "have not moved, and no optimizer holds them. The parameters of the model itself are frozen: hand "
                    "the kit to whatever trains, Trainer(model=kit) or AdamW(kit.parameters()). If the adapter is not "
                    "to be trained, kit.train_only(...) with those that are",
                    stacklevel=3,
                )
        if not self._open:
            _open_watches.discard(self)


@cache
def _register_hook() -> None:
    """Once for the process, at the first training forward."""
    register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled optimizer is not watched
        return
    for watch in list(_open_watches):
        watch.after_step(optimizer)
