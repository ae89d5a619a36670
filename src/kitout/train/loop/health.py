"""Health checks of training, step by step: grad norms that are finite, parameters that move, adapters with an effect.

A job whose grad norm is not finite stops alone if other jobs continue, and reports its examples. It knows jobs and
gradients, and nothing of how they came about.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.eval_mode import eval_mode
from kitout.errors import TrainingDiverged, UnusedSite
from kitout.files.atomic import write_text
from kitout.kit import Kit
from kitout.train.loop import distributed
from kitout.train.loop.jobs import Job, clip_grad_norm, forward_key

EFFECT_DEADLINE_STEPS = 16  # after the warmup; by then an adapter has to change the model's output


class Health:
    """Checks the jobs of one run and clips their gradients.

    has_fixed_data: False where examples are made while training: the first of them may teach nothing, as answers that
    all have the same reward, so the checks wait for the first step with a gradient. Its jobs need each other, as a
    policy and its value, and so all stop where one diverges.
    """

    diverged: dict[str, str]
    """Jobs that stopped because they diverged, and the message."""

    def __init__(self, kit: Kit, jobs: Sequence[Job], folder: Path, has_fixed_data: bool = True) -> None:
        self.kit, self.jobs, self.folder, self.has_fixed_data = kit, list(jobs), folder, has_fixed_data
        self._awaits_gradient = False
        self.diverged = {}
        self._start_values: dict[str, Tensor] = {}  # empty before the first step and once every effect has shown
        self._divergences: list[dict[str, Any]] = []
        self._effect_due_step = 0

    def trained_parameters(self, job: Job) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.kit[job.name].named_parameters() if value.requires_grad]

    def clip(self, step: int) -> float:
        """Clips each job's gradients by its own norm; the largest norm. TrainingDiverged when no job is left."""
        norms = [0.0]
        if step == 0 or self._awaits_gradient:
            self._check_gradients(step)
        for job in self.jobs:
            if step >= len(job.batches):
                continue
            parameters = [value for _, value in self.trained_parameters(job)]
            if job.name not in self.diverged:
                norm = clip_grad_norm(parameters, job.settings.max_grad_norm)
                norms.append(norm)
                if not norm < float("inf"):
                    self._stop_job(job, step, norm)
            if job.name in self.diverged:
                for value in parameters:
                    value.grad = None
        if len(self.diverged) == len(self.jobs) or (self.diverged and not self.has_fixed_data):
            raise TrainingDiverged("\n".join(self.diverged.values()))
        return max(norms)

    def _stop_job(self, job: Job, step: int, norm: float) -> None:
        locations = [str(getattr(job.examples[i], "location", i)) for i in job.batches[step]]
        lr = self.kit[job.name].method.training_defaults().lr if job.settings.lr is None else job.settings.lr
        divergence = {"job": job.name, "step": step + 1, "norm": str(norm), "lr": lr, "examples": locations}
        self._divergences.append(divergence)
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "diverged.json", json.dumps(self._divergences, indent=1))
        self.diverged[job.name] = (
            f"{job.name!r}, step {step + 1}: the grad norm is {norm}; try a lower train.lr than {lr:g}, or look "
            f"at these examples (all in diverged.json): {', '.join(locations[:5])}"
        )
        if len(self.jobs) > 1 and self.has_fixed_data:
            warnings.warn(f"{self.diverged[job.name]}; the other jobs continue", RuntimeWarning, stacklevel=2)

    def _check_gradients(self, step: int) -> None:
        """After the first backward every trained tensor has a gradient, and not all of a job's are zero."""
        trained = [(job.name, name, value) for job in self.jobs for name, value in self.trained_parameters(job)]
        without = [f"{job}: {name}" for job, name, value in trained if value.grad is None]
        nonzero = {job for job, _, value in trained if value.grad is not None and bool((value.grad != 0).any())}
        self._awaits_gradient = not self.has_fixed_data and not without and len(nonzero) < len(self.jobs)
        if self._awaits_gradient:
            return
        without += [f"{job.name}: all of them are zero" for job in self.jobs if not without and job.name not in nonzero]
        if without:
            ungraded = {job for job, _, value in trained if value.grad is None}
            names = [
                job.name for job in self.jobs if job.name in (ungraded or {one.name for one in self.jobs} - nonzero)
            ]
            raise UnusedSite.of(
                names,
                f"{len(without)} trained tensors have no gradient after the first step, so they would never be "
                f"trained: {', '.join(without[:5])}; choose other targets, or leave these out",
            )
        self._effect_due_step = step + 2
        self._start_values = {f"{job}/{name}": value.detach().clone() for job, name, value in trained}

    @torch.no_grad()
    def check_effect(self, step: int) -> None:
        """After the second step every adapter has moved, and the model's output differs with it.

        In a half-precision base a first small change may round away. Then it is checked again, at twice the step.
        """
        last = max(len(job.batches) for job in self.jobs)
        if not self._start_values or (step < self._effect_due_step and step < last):
            return
        running = [job for job in self.jobs if job.name not in self.diverged]
        unmoved = [job for job in running if not self._has_moved(job)]
        moved = [job for job in running if job not in unmoved]
        # of an answer's ratio to itself no loss shows whether the model has changed
        without_effect = unmoved + (self._without_visible_effect(moved) if self.has_fixed_data else [])
        self._effect_due_step *= 2
        warmup = max((round(job.settings.warmup_ratio * len(job.batches)) for job in without_effect), default=0)
        if unmoved or (without_effect and step >= min(last, warmup + EFFECT_DEADLINE_STEPS)):
            finding = "none of its parameters has changed" if unmoved else "the model's output is the same without it"
            names = [job.name for job in unmoved or without_effect]
            raise UnusedSite.of(
                names, f"{names[0]!r} after {step} steps: {finding}; is its learning rate 0, or its strength?"
            )
        if not without_effect:
            self._start_values = {}

    def _has_moved(self, job: Job) -> bool:
        return any(
            not torch.equal(value, self._start_values[f"{job.name}/{name}"])
            for name, value in self.trained_parameters(job)
        )

    def _without_visible_effect(self, jobs: Sequence[Job]) -> list[Job]:
        """Those without an effect on one example each; jobs that share forwards are checked together."""
        groups: dict[Hashable, list[Job]] = {}
        for job in jobs:
            adapter = self.kit[job.name]
            if not adapter.heads:  # with heads the base may not even have an answer for as many classes
                key = forward_key(job, adapter)
                groups.setdefault(job.name if key is None else (key,), []).append(job)
        return [job for group in groups.values() for job in self._same_as_base(group)]

    def _same_as_base(self, jobs: Sequence[Job]) -> list[Job]:
        objective = jobs[0].objective
        batch = objective.collate([job.examples[job.batches[0][-1]] for job in jobs], None)
        weights = torch.ones(len(jobs), device=self.kit.device)
        names = [job.name for job in jobs]
        with eval_mode(self.kit.base, self.kit):
            with self.kit.use([n for n in names for _ in range(objective.rows)] if len(names) > 1 else names[0]):
                tuned = objective.losses(self.kit, batch, weights).per_example
            with self.kit.use(None):
                base = objective.losses(self.kit, batch, weights).per_example
        return [job for job, is_same in zip(jobs, (tuned == base).tolist(), strict=True) if is_same]
