"""Jobs: adapters trained at once on one frozen base, each with its own examples, rate, clipping, schedule and seed.

A run has one job or several. Several share every forward row by row, and each comes out as if it had been alone: its
loss is normalized by its own targets, its gradients clipped by their own norm, its optimizer state untouched by steps
it has no part in. It knows batches and parameters, and nothing of files, screens or the loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from kitout.runtime.adapter import Adapter
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.optimizer import parameter_groups
from kitout.train.objectives.objective import Objective, StepObjective


@dataclass(frozen=True)
class Job:
    """One adapter in training."""

    name: str
    """Of the adapter."""
    objective: Objective
    """Turns examples into batches and batches into losses."""
    examples: Sequence[Any]
    """The training split, encoded."""
    batches: Sequence[Sequence[int]]
    """The indices of the examples of each optimizer step."""
    settings: TrainConfig
    """Its learning rate, schedule, clipping and seed."""
    validation: Sequence[Any] = ()
    """The validation split, encoded."""

    def num_targets(self, step: int) -> int:
        """What the loss of a step is normalized by: its target tokens, over all micro-batches and processes."""
        return sum(self.objective.num_targets(self.examples[i]) for i in self.batches[step])


def lr_factor(step: int, *, num_steps: int, warmup_ratio: float, lr_schedule: str) -> float:
    """The factor of the learning rate at a step: linear warmup, then the schedule; 0 after the last step."""
    if step >= num_steps:
        return 0.0
    warmup = round(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if lr_schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, num_steps - warmup)
    return 1.0 - done if lr_schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


def build_optimizer(jobs: Sequence[Job], adapters: Sequence[Adapter]) -> torch.optim.AdamW:
    """One AdamW over all jobs: it skips parameters without a gradient, so a job without rows does not move."""
    groups = []
    for job, adapter in zip(jobs, adapters, strict=True):
        s = job.settings
        of_job = parameter_groups(
            adapter, s.lr, weight_decay=s.weight_decay, head_lr=s.head_lr, loraplus_ratio=s.loraplus_lr_ratio
        )
        groups += [{**group, "job": job.name} for group in of_job]
    devices = {value.device.type for group in groups for value in group["params"]}
    return torch.optim.AdamW(groups, fused=devices <= {"cpu", "cuda"})  # one pass over the values instead of ten


def build_scheduler(jobs: Sequence[Job], optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Each group follows its own job's schedule."""
    lr_lambdas: dict[str, Callable[[int], float]] = {
        job.name: functools.partial(
            lr_factor,
            num_steps=len(job.batches),
            warmup_ratio=job.settings.warmup_ratio,
            lr_schedule=job.settings.lr_schedule,
        )
        for job in jobs
    }
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [lr_lambdas[group["job"]] for group in optimizer.param_groups])


def clip_grad_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scales these gradients to a norm of at most `max_norm`; the norm before, inf or nan as it is."""
    gradients: list[Tensor] = [value.grad for value in parameters if value.grad is not None]
    if not gradients:
        return 0.0
    norm = torch.nn.utils.get_total_norm(gradients)
    if torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)
    return float(norm)


def forward_key(job: Job, adapter: Adapter) -> Hashable | None:
    """Jobs with the same key may share a forward without a change to either; None: with no other.

    They have the same form of batch and as many rows per example. Alone: dropout, and an objective that keeps something
    of its own step.
    """
    objective = job.objective
    if objective.batch_key is None or adapter.has_dropout or isinstance(objective, StepObjective):
        return None
    return objective.batch_key, objective.rows


def cut_between_jobs(rows: Sequence[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    """Rows (job, example), those of a job side by side, in parts of at most `size`.

    A job that fits into one is not cut: its rows can share what they begin with.
    """
    part: list[tuple[int, int]] = []
    for _, of_job in groupby(rows, key=itemgetter(0)):
        own = list(of_job)
        if part and len(own) <= size < len(part) + len(own):
            yield part
            part = []
        part += own
        while len(part) > size:
            yield part[:size]
            part = part[size:]
    if part:
        yield part
