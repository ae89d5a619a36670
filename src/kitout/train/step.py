"""One optimiser step's forward and backward: rows of all jobs, cut into micro-batches, one exactly normalised loss.

The whole step is one sum: how it is cut, into how many processes or after memory ran out, does not change what it is a
sum of. Whatever is drawn follows from the job's seed and the step. It knows jobs and objectives, and nothing of
optimisers, files or the loop.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kitout.kit.kit import Kit
from kitout.train import memory, processes
from kitout.train.batch import Batch
from kitout.train.jobs import Job, fusable
from kitout.train.objective import Losses

Rows = list[tuple[int, int]]  # (job, index of its item)
Backward = Callable[[Tensor], Any]
Apart = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]  # gradients of this backward stay here


class Work:
    """Runs steps and keeps count. micro: rows of one forward at most; it halves when memory runs out, and stays so.

    sums: per job since the last `drain`, summed loss and terms. tokens, padded, seconds: since the run began.
    """

    def __init__(self, kit: Kit, jobs: Sequence[Job], micro: int) -> None:
        self.kit, self.jobs, self.micro, self.halved = kit, list(jobs), micro, 0
        self.fused = [fusable(kit[job.name]) for job in jobs]
        self.sums: list[list[float]] = [[0.0, 0.0] for _ in jobs]
        self.tokens = self.padded = 0
        self.seconds = 0.0

    def step(self, model: nn.Module, rows: Rows, step: int, backward: Backward, apart: Apart) -> Tensor:
        """The mean of the jobs' losses; gradients are left in the parameters, which had none."""
        start = time.perf_counter()
        while True:
            try:
                total = self._whole(model, rows, step, backward, apart)
                break
            except (RuntimeError, MemoryError) as wrong:
                if not memory.is_full(wrong) or self.micro == 1 or processes.world() > 1:
                    raise
            model.zero_grad()
            self.micro, self.halved = (self.micro + 1) // 2, self.halved + 1
            warnings.warn(f"memory ran out: going on with train.micro_batch={self.micro}", RuntimeWarning, stacklevel=2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.seconds += time.perf_counter() - start
        return total

    def _whole(self, model: nn.Module, rows: Rows, step: int, backward: Backward, apart: Apart) -> Tensor:
        norms = {j: self.jobs[j].terms(step) for j in {j for j, _ in rows}}
        parts = self.parts(processes.mine(rows))
        sums = [[0.0, 0.0] for _ in self.jobs]
        tokens = padded = 0
        total = torch.zeros((), device=self.kit.device)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else apart(model):
                found, batch = self._forward(model, part, norms, step, number)
                backward(found.total)
            total += found.total.detach()
            tokens, padded = tokens + batch.tokens, padded + batch.padded
            for (j, _), value, of in zip(part, found.rows.tolist(), found.of.tolist(), strict=True):
                sums[j][0] += value
                sums[j][1] += of
        for kept, new in zip(self.sums, sums, strict=True):  # only now: a step that was tried again counts once
            kept[0], kept[1] = kept[0] + new[0], kept[1] + new[1]
        self.tokens, self.padded = self.tokens + tokens, self.padded + padded
        return total / len(norms)

    def parts(self, rows: Rows) -> list[Rows]:
        """Micro-batches: jobs that draw no dropout share them, each other one has its own."""
        together = [row for row in rows if self.fused[row[0]]]
        apart = [[row for row in rows if row[0] == j] for j in range(len(self.jobs)) if not self.fused[j]]
        groups = [group for group in [together, *apart] if group]
        return [group[at : at + self.micro] for group in groups for at in range(0, len(group), self.micro)]

    def _forward(
        self, model: nn.Module, part: Rows, norms: dict[int, int], step: int, number: int
    ) -> tuple[Losses, Batch]:
        first = self.jobs[part[0][0]]
        device = self.kit.device
        weights = torch.tensor([processes.world() / max(1, norms[j]) for j, _ in part], device=device)
        worn = {self.jobs[j].name for j, _ in part}
        names: Any = worn.pop() if len(worn) == 1 else [self.jobs[j].name for j, _ in part]
        seed = mixed(first.settings.seed, step, number, processes.rank())
        batch = first.objective.collate([self.jobs[j].items[i] for j, i in part], seed)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), self.kit.use(names):
            torch.manual_seed(seed)
            return first.objective.losses(model, batch, weights), batch

    def drain(self) -> dict[str, float]:
        """Each job's loss per term since the last time, over all processes; a job without a term is left out."""
        sums = processes.gathered([self.sums])
        self.sums = [[0.0, 0.0] for _ in self.jobs]
        told = {}
        for j, job in enumerate(self.jobs):
            loss, terms = (sum(part[j][k] for part in sums) for k in (0, 1))
            if terms:
                told[job.name] = loss / terms
        return told

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {name: getattr(self, name) for name in ("micro", "halved", "sums", "tokens", "padded", "seconds")}

    def restore(self, state: dict[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])


def mixed(*parts: int) -> int:
    """One seed from several, the same on every machine."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return seed
