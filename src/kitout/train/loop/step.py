"""One optimiser step's forward and backward: rows of all jobs, cut into micro-batches, one exactly normalised loss.

The whole step is one sum: how it is cut, into how many processes or after memory ran out, does not change what it is a
sum of. Whatever is drawn follows from the job's seed and the step. It knows jobs and objectives, and nothing of
optimisers, files or the loop.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base import memory
from kitout.kit import Kit
from kitout.train.loop import distributed
from kitout.train.loop.jobs import Job, fusable
from kitout.train.objectives.batch import Batch
from kitout.train.objectives.objective import Losses

Rows = list[tuple[int, int]]  # (job, index of its item)
Backward = Callable[[Tensor], Any]
COUNTED = ("tokens", "padded", "processor_seconds")  # by every process on its own
Apart = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]  # gradients of this backward stay here


@dataclass(frozen=True)
class Part:
    """One micro-batch. number: among those of its jobs. idle: it counts for nothing, and keeps processes in step."""

    rows: Rows
    number: int
    idle: bool = False


class Work:
    """Runs steps and keeps count. micro: rows of one forward at most; it halves when memory runs out, and stays so.

    sums: per job since the last `drain`, summed loss and terms. tokens, padded, seconds: since the run began;
    processor_seconds: of all threads, which a busy machine does not stretch.
    spent: per job since the run began, seconds and processor seconds of its forwards and backwards; a forward that jobs
    share counts for each by its rows.
    """

    def __init__(self, kit: Kit, jobs: Sequence[Job], micro: int) -> None:
        self.kit, self.jobs, self.halved = kit, list(jobs), 0
        self.micro = min(distributed.gathered([micro]))
        self.groups = [_group(kit, job, number) for number, job in enumerate(jobs)]
        self.sums: list[list[float]] = [[0.0, 0.0] for _ in jobs]
        self.tokens = self.padded = 0
        self.seconds = self.processor_seconds = 0.0
        self.spent: list[list[float]] = [[0.0, 0.0] for _ in jobs]

    def step(self, model: nn.Module, rows: Rows, step: int, backward: Backward, apart: Apart) -> Tensor:
        """The mean of the jobs' losses; gradients are left in the parameters, which had none."""
        start, spent = time.perf_counter(), time.process_time()
        while True:
            try:
                total = self._whole(model, rows, step, backward, apart)
                break
            except (RuntimeError, MemoryError) as wrong:
                largest = max(len(part.rows) for part in self.parts(rows))
                if not memory.is_out_of_memory(wrong) or largest == 1 or distributed.world() > 1:
                    raise
            model.zero_grad()
            self.micro, self.halved = (largest + 1) // 2, self.halved + 1
            warnings.warn(f"memory ran out: going on with train.micro_batch={self.micro}", RuntimeWarning, stacklevel=2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.seconds += time.perf_counter() - start
        self.processor_seconds += time.process_time() - spent
        return total

    def _whole(self, model: nn.Module, rows: Rows, step: int, backward: Backward, apart: Apart) -> Tensor:
        norms = {j: self.jobs[j].terms(step) for j in {j for j, _ in rows}}
        parts = self.parts(distributed.mine(rows))
        most = max(len(self.parts(share)) for share in distributed.shares(rows))
        parts += [Part(rows[:1], 0, idle=True)] * (most - len(parts))
        sums = [[0.0, 0.0] for _ in self.jobs]
        tokens = padded = 0
        total = torch.zeros((), device=self.kit.device)
        for at, part in enumerate(parts):
            clocks = time.perf_counter(), time.process_time()
            with contextlib.nullcontext() if at == most - 1 else apart(model):
                found, batch = self._forward(model, part, norms, step)
                backward(found.total)
            passed = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
            for j, _ in part.rows:
                for k in (0, 1):
                    self.spent[j][k] += passed[k] / len(part.rows)
            if part.idle:
                continue
            total += found.total.detach()
            tokens, padded = tokens + batch.tokens, padded + batch.padded
            for (j, _), value, of in zip(part.rows, found.rows.tolist(), found.of.tolist(), strict=True):
                sums[j][0] += value
                sums[j][1] += of
        for kept, new in zip(self.sums, sums, strict=True):  # only now: a step that was tried again counts once
            kept[0], kept[1] = kept[0] + new[0], kept[1] + new[1]
        self.tokens, self.padded = self.tokens + tokens, self.padded + padded
        return total / len(norms)

    def parts(self, rows: Rows) -> list[Part]:
        """Micro-batches: jobs that may stand in one batch share them, each other one has its own."""
        together: dict[Hashable, Rows] = {}
        for row in rows:
            together.setdefault(self.groups[row[0]], []).append(row)
        cuts = [(group, at) for group in together.values() for at in range(0, len(group), self.micro)]
        return [Part(group[at : at + self.micro], at // self.micro) for group, at in cuts]

    def _forward(self, model: nn.Module, part: Part, norms: dict[int, int], step: int) -> tuple[Losses, Batch]:
        device = self.kit.device
        owners = [self.jobs[j] for j, _ in part.rows]
        shares = [0.0 if part.idle else distributed.world() / max(1, norms[j]) for j, _ in part.rows]
        weights = torch.tensor(shares, device=device)
        worn = {job.name for job in owners}
        names: Any = worn.pop() if len(worn) == 1 else [job.name for job in owners]
        seeds = [mixed(self.jobs[j].settings.seed, step, i) for j, i in part.rows]
        objective = owners[0].objective
        batch = objective.collate([self.jobs[j].items[i] for j, i in part.rows], seeds)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), self.kit.use(names):
            torch.manual_seed(mixed(owners[0].settings.seed, step, part.number, distributed.rank()))
            return objective.losses(model, batch, weights), batch

    def drain(self) -> dict[str, float]:
        """Each job's loss per term since the last time, over all processes; a job without a term is left out."""
        sums = distributed.gathered([self.sums])
        self.sums = [[0.0, 0.0] for _ in self.jobs]
        told = {}
        for j, job in enumerate(self.jobs):
            loss, terms = (sum(part[j][k] for part in sums) for k in (0, 1))
            if terms:
                told[job.name] = loss / terms
        return told

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; `counts` of every process, so all of them have to ask."""
        own = {"sums": self.sums, **{name: getattr(self, name) for name in COUNTED}}
        times = {"seconds": self.seconds, "spent": self.spent}
        return {"micro": self.micro, "halved": self.halved, "counts": distributed.gathered([own]), **times}

    def restore(self, state: dict[str, Any]) -> None:
        """As it was; with other processes than before the counts are shared out."""
        self.micro, self.halved, self.seconds = state["micro"], state["halved"], state["seconds"]
        self.spent = state.get("spent", self.spent)  # a checkpoint written before has none
        own = distributed.mine(state["counts"])
        self.sums = [[sum(part["sums"][j][k] for part in own) for k in (0, 1)] for j in range(len(self.jobs))]
        for name in COUNTED:
            setattr(self, name, sum(part.get(name, 0) for part in own))


def _group(kit: Kit, job: Job, number: int) -> Hashable:
    """Jobs of the same group may share a forward: what they draw, learn and answer with is of one form."""
    form = job.objective.form
    if form is None or not fusable(kit[job.name]):
        return number
    heads = kit[job.name].heads
    return form, tuple((path, tuple(tuple(v.shape) for v in head.parameters())) for path, head in heads.items())


def mixed(*parts: int) -> int:
    """One seed from several, the same on every machine."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return seed
