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
from kitout.train.loop.optimizer import parameter_groups
from kitout.train.objectives.objective import Objective


class TrainingDiverged(KitoutError, ArithmeticError):
    """A loss or a gradient that is no number."""


@dataclass(frozen=True)
class Job:
    """name: of the adapter. items: what is learnt. steps: the indices of each of its optimiser steps."""

    name: str
    objective: Objective
    examples: Sequence[Any]
    batches: Sequence[Sequence[int]]
    settings: TrainConfig
    validation: Sequence[Any] = ()  # measured during training

    def num_targets(self, step: int) -> int:
        """What the loss of a step is normalised by: its learnt tokens, over all micro-batches and processes."""
        return sum(self.objective.num_targets(self.examples[i]) for i in self.batches[step])


def lr_factor(step: int, *, num_steps: int, warmup_ratio: float, lr_schedule: str) -> float:
    """The part of the full rate at a step: a linear rise, then as the schedule says; 0 after the last step."""
    if step >= num_steps:
        return 0.0
    rise = round(warmup_ratio * num_steps)
    if step < rise:
        return (step + 1) / rise
    if lr_schedule == "constant":
        return 1.0
    done = (step - rise) / max(1, num_steps - rise)
    return 1.0 - done if lr_schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


def build_optimizer(jobs: Sequence[Job], adapters: Sequence[Adapter]) -> torch.optim.AdamW:
    """One AdamW over all jobs: it leaves parameters without a gradient alone, so an absent job does not move."""
    parts = []
    for job, adapter in zip(jobs, adapters, strict=True):
        s = job.settings
        found = parameter_groups(
            adapter, s.lr, weight_decay=s.weight_decay, head_lr=s.head_lr, loraplus_ratio=s.loraplus_lr_ratio
        )
        parts += [{**group, "job": job.name} for group in found]
    devices = {value.device.type for part in parts for value in part["params"]}
    return torch.optim.AdamW(parts, fused=devices <= {"cpu", "cuda"})  # one pass over the values instead of ten


def build_scheduler(jobs: Sequence[Job], optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Each group follows its own job's schedule."""
    rules: dict[str, Callable[[int], float]] = {
        job.name: functools.partial(
            lr_factor,
            num_steps=len(job.batches),
            warmup_ratio=job.settings.warmup_ratio,
            lr_schedule=job.settings.lr_schedule,
        )
        for job in jobs
    }
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [rules[group["job"]] for group in optimizer.param_groups])


def clip_grad_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scales these gradients to a norm of at most `most`; their norm before, inf or nan as it is."""
    gradients: list[Tensor] = [value.grad for value in parameters if value.grad is not None]
    if not gradients:
        return 0.0
    norm = torch.nn.utils.get_total_norm(gradients)
    if torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)
    return float(norm)


def can_share_forward(adapter: Adapter) -> bool:
    """Whether its rows may share a forward with others and stay what they are alone: it draws no dropout."""
    dropped = [m.p for m in adapter.modules() if isinstance(m, nn.Dropout) and m.p]
    return not dropped and not adapter.method.model_dump().get("dropout", 0.0)
