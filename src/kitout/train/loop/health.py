"""Whether learning is sound, step by step: gradients that are numbers, values that move, adapters that have an effect.

A job whose gradient is no number stops alone if others go on, and says which examples it was. It knows jobs and
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
from kitout.errors import UnusedSite
from kitout.files.atomic import write_text
from kitout.kit import Kit
from kitout.train.loop import distributed
from kitout.train.loop.jobs import Job, TrainingDiverged, can_share_forward, clip_grad_norm

EFFECT_DEADLINE_STEPS = 16  # steps at the full rate after which an adapter has to show in what the model says


class Health:
    """stopped: jobs that left on their own, and why."""

    def __init__(self, kit: Kit, jobs: Sequence[Job], folder: Path) -> None:
        self.kit, self.jobs, self.folder = kit, list(jobs), folder
        self.diverged: dict[str, str] = {}
        self._start_values: dict[str, Tensor] = {}
        self._divergences: list[dict[str, Any]] = []
        self._effect_due_step = 2

    def trained_parameters(self, job: Job) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.kit[job.name].named_parameters() if value.requires_grad]

    def clip(self, step: int) -> float:
        """Each job's gradient by its own norm; the largest norm. Diverged, when no job is left."""
        norms = [0.0]
        if step == 0:
            self._check_gradients()
        for job in self.jobs:
            if step >= len(job.batches):
                continue
            values = [value for _, value in self.trained_parameters(job)]
            if job.name not in self.diverged:
                norm = clip_grad_norm(values, job.settings.max_grad_norm)
                norms.append(norm)
                if not norm < float("inf"):
                    self._stop_job(job, step, norm)
            if job.name in self.diverged:
                for value in values:
                    value.grad = None
        if len(self.diverged) == len(self.jobs):
            raise TrainingDiverged("\n".join(self.diverged.values()))
        return max(norms)

    def _stop_job(self, job: Job, step: int, norm: float) -> None:
        places = [str(getattr(job.examples[i], "location", i)) for i in job.batches[step]]
        lr = self.kit[job.name].method.training_defaults().lr if job.settings.lr is None else job.settings.lr
        self._divergences.append({"job": job.name, "step": step + 1, "norm": str(norm), "lr": lr, "examples": places})
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "diverged.json", json.dumps(self._divergences, indent=1))
        self.diverged[job.name] = (
            f"{job.name!r}, step {step + 1}: the gradient's norm is {norm}; try a lower train.lr than {lr:g}, or look "
            f"at these examples (all in diverged.json): {', '.join(places[:5])}"
        )
        if len(self.jobs) > 1:
            warnings.warn(f"{self.diverged[job.name]}; the other jobs go on", RuntimeWarning, stacklevel=2)

    def _check_gradients(self) -> None:
        """After the first backward every trained value has a gradient, and not all of a job's are zero."""
        held = [(job.name, name, value) for job in self.jobs for name, value in self.trained_parameters(job)]
        dead = [f"{job}: {name}" for job, name, value in held if value.grad is None]
        reached = {job for job, _, value in held if value.grad is not None and bool((value.grad != 0).any())}
        dead += [f"{job.name}: all of them are zero" for job in self.jobs if not dead and job.name not in reached]
        if dead:
            raise UnusedSite(
                f"{len(dead)} trained tensors got no gradient from the first step, so they would never learn: "
                f"{', '.join(dead[:5])}; choose other targets, or leave these out"
            )
        self._start_values = {f"{job}/{name}": value.detach().clone() for job, name, value in held}

    @torch.no_grad()
    def check_effect(self, step: int) -> None:
        """After the second step something has moved in every adapter, and wearing it changes what the model says.

        A first small change may be lost in a half-precision base: then it is looked for again, at twice the step.
        """
        last = max(len(job.batches) for job in self.jobs)
        if not self._start_values or (step < self._effect_due_step and step < last):
            return
        going = [job for job in self.jobs if job.name not in self.diverged]
        still = [job for job in going if not self._has_moved(job)]
        silent = still + self._without_visible_effect([job for job in going if job not in still])
        self._effect_due_step *= 2
        risen = max((round(job.settings.warmup_ratio * len(job.batches)) for job in silent), default=0)
        if still or (silent and step >= min(last, risen + EFFECT_DEADLINE_STEPS)):
            what = "nothing in it has changed" if still else "the model says the same with and without it"
            name = (still or silent)[0].name
            raise UnusedSite(f"{name!r} after {step} steps: {what}; is its learning rate 0, or its strength?")
        if not silent:
            self._start_values = {}

    def _has_moved(self, job: Job) -> bool:
        return any(
            not torch.equal(value, self._start_values[f"{job.name}/{name}"])
            for name, value in self.trained_parameters(job)
        )

    def _without_visible_effect(self, jobs: Sequence[Job]) -> list[Job]:
        """Those without an effect on one example each; jobs that share forwards are asked together."""
        groups: dict[Hashable, list[Job]] = {}
        for job in jobs:
            adapter = self.kit[job.name]
            if not adapter.heads:  # with heads the base may not even have an answer for as many classes
                alone = job.objective.batch_key is None or not can_share_forward(adapter)
                groups.setdefault(job.name if alone else (job.objective.batch_key,), []).append(job)
        return [job for group in groups.values() for job in self._same_as_base(group)]

    def _same_as_base(self, jobs: Sequence[Job]) -> list[Job]:
        objective = jobs[0].objective
        batch = objective.collate([job.examples[job.batches[0][-1]] for job in jobs], None)
        weights = torch.ones(batch.num_examples, device=self.kit.device)
        names = [job.name for job in jobs]
        with eval_mode(self.kit.base, self.kit):
            with self.kit.use(names if len(names) > 1 else names[0]):
                on = objective.losses(self.kit, batch, weights).per_example
            with self.kit.use(None):
                off = objective.losses(self.kit, batch, weights).per_example
        return [job for job, same in zip(jobs, (on == off).tolist(), strict=True) if same]
