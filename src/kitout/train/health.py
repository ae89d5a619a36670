"""Whether learning is sound, step by step: gradients that are numbers, values that move, adapters that have an effect.

A job whose gradient is no number stops alone if others go on, and says which examples it was. It knows jobs and
gradients, and nothing of how they came about.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kitout.errors import SilentSite
from kitout.kit.kit import Kit
from kitout.train.jobs import Diverged, Job, clipped


class Health:
    """stopped: jobs that left on their own, and why."""

    def __init__(self, kit: Kit, jobs: Sequence[Job], folder: Path) -> None:
        self.kit, self.jobs, self.folder = kit, list(jobs), folder
        self.stopped: dict[str, str] = {}
        self._started: dict[str, Tensor] | None = None

    def values(self, job: Job) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.kit[job.name].named_parameters() if value.requires_grad]

    def clip(self, step: int) -> float:
        """Each job's gradient by its own norm; the largest norm. Diverged, when no job is left."""
        norms = [0.0]
        for job in self.jobs:
            if step >= len(job.steps):
                continue
            values = [value for _, value in self.values(job)]
            if job.name not in self.stopped:
                norm = clipped(values, job.settings.clip)
                norms.append(norm)
                if not norm < float("inf"):
                    self._stop(job, step, norm)
            if job.name in self.stopped:
                for value in values:
                    value.grad = None
        if len(self.stopped) == len(self.jobs):
            raise Diverged("\n".join(self.stopped.values()))
        if step == 0:
            self._check_gradients()
        return max(norms)

    def _stop(self, job: Job, step: int, norm: float) -> None:
        places = [str(getattr(job.items[i], "place", i)) for i in job.steps[step]]
        lr = self.kit[job.name].method.advised().lr if job.settings.lr is None else job.settings.lr
        self.folder.mkdir(parents=True, exist_ok=True)
        note = {"job": job.name, "step": step + 1, "norm": str(norm), "lr": lr, "examples": places}
        (self.folder / "diverged.json").write_text(json.dumps(note, indent=1), encoding="utf-8")
        self.stopped[job.name] = (
            f"{job.name!r}, step {step + 1}: the gradient's norm is {norm}; try a lower train.lr than {lr:g}, or look "
            f"at these examples (all in diverged.json): {', '.join(places[:5])}"
        )
        if len(self.jobs) > 1:
            warnings.warn(f"{self.stopped[job.name]}; the other jobs go on", RuntimeWarning, stacklevel=2)

    def _check_gradients(self) -> None:
        """After the first backward every trained value has a gradient."""
        held = [
            (job, name, value) for job in self.jobs if job.name not in self.stopped for name, value in self.values(job)
        ]
        dead = [f"{job.name}: {name}" for job, name, value in held if value.grad is None]
        if dead:
            raise SilentSite(
                f"{len(dead)} trained tensors got no gradient from the first step, so they would never learn: "
                f"{', '.join(dead[:5])}; choose other targets, or leave these out"
            )
        self._started = {f"{job.name}/{name}": value.detach().clone() for job, name, value in held}

    @torch.no_grad()
    def check_effect(self) -> None:
        """After the second step something has moved in every adapter, and wearing it changes what the model says."""
        started, self._started = self._started, None
        for job in self.jobs if started is not None else ():
            if job.name in self.stopped:
                continue
            assert started is not None
            moved = any(not torch.equal(value, started[f"{job.name}/{name}"]) for name, value in self.values(job))
            batch = job.objective.collate([job.items[i] for i in job.steps[0][-1:]], None)
            weights = torch.ones(batch.rows, device=self.kit.device)
            with self.kit.use(job.name):
                on = job.objective.losses(self.kit, batch, weights).rows
            with self.kit.use(None):
                off = job.objective.losses(self.kit, batch, weights).rows
            if not moved or torch.equal(on, off):
                what = "nothing in it has changed" if not moved else "the model says the same with and without it"
                raise SilentSite(f"{job.name!r} after two steps: {what}; is its learning rate 0, or its strength?")
