"""Jobs: adapters that learn at once on one frozen base, each with its own examples, rate, clipping, schedule and seed.

One run is one job; several share every forward pass row by row, and each comes out as if it had been alone: its loss is
normalised by its own terms, its gradient clipped by its own norm, its optimiser untouched by steps it has no part in.
It knows plans and parameters, and nothing of files, screens or the loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kitout.errors import KitoutError
from kitout.runtime.adapter import Adapter
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.optimizer import groups
from kitout.train.objectives.objective import Objective


class Diverged(KitoutError, ArithmeticError):
    """A loss or a gradient that is no number."""


@dataclass(frozen=True)
class Job:
    """name: of the adapter. items: what is learnt. steps: the indices of each of its optimiser steps."""

    name: str
    objective: Objective
    items: Sequence[Any]
    steps: Sequence[Sequence[int]]
    settings: TrainConfig
    watched: Sequence[Any] = ()  # measured during training

    def terms(self, step: int) -> int:
        """What the loss of a step is normalised by: its learnt tokens, over all micro-batches and processes."""
        return sum(self.objective.terms(self.items[i]) for i in self.steps[step])


def share(step: int, *, steps: int, warmup: float, schedule: str) -> float:
    """The part of the full rate at a step: a linear rise, then as the schedule says; 0 after the last step."""
    if step >= steps:
        return 0.0
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    done = (step - rise) / max(1, steps - rise)
    return 1.0 - done if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


def optimiser(jobs: Sequence[Job], adapters: Sequence[Adapter]) -> torch.optim.AdamW:
    """One AdamW over all jobs: it leaves parameters without a gradient alone, so an absent job does not move."""
    parts = []
    for job, adapter in zip(jobs, adapters, strict=True):
        s = job.settings
        found = groups(adapter, s.lr, decay=s.decay, head_lr=s.head_lr, ratio=s.ratio)
        parts += [{**group, "job": job.name} for group in found]
    devices = {value.device.type for part in parts for value in part["params"]}
    return torch.optim.AdamW(parts, fused=devices <= {"cpu", "cuda"})  # one pass over the values instead of ten


def scheduler(jobs: Sequence[Job], made: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Each group follows its own job's schedule."""
    rules: dict[str, Callable[[int], float]] = {
        job.name: functools.partial(
            share, steps=len(job.steps), warmup=job.settings.warmup, schedule=job.settings.schedule
        )
        for job in jobs
    }
    return torch.optim.lr_scheduler.LambdaLR(made, [rules[group["job"]] for group in made.param_groups])


def clipped(values: Sequence[nn.Parameter], most: float) -> float:
    """Scales these gradients to a norm of at most `most`; their norm before, inf or nan as it is."""
    gradients: list[Tensor] = [value.grad for value in values if value.grad is not None]
    if not gradients:
        return 0.0
    norm = torch.nn.utils.get_total_norm(gradients)
    if torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(list(values), most, norm)
    return float(norm)


def fusable(adapter: Adapter) -> bool:
    """Whether its rows may share a forward with others and stay what they are alone: it draws no dropout."""
    dropped = [m.p for m in adapter.modules() if isinstance(m, nn.Dropout) and m.p]
    return not dropped and not adapter.method.model_dump().get("dropout", 0.0)
