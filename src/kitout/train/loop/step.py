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
from kitout.train.loop.jobs import Job, can_share_forward
from kitout.train.objectives.objective import Batch, Losses

StepRows = list[tuple[int, int]]  # (job, index of its item)
Backward = Callable[[Tensor], Any]
PER_PROCESS_COUNTS = ("tokens", "padded", "processor_seconds")  # by every process on its own
NoSync = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]  # gradients of this backward stay here


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch. number: among those of its jobs. idle: it counts for nothing, and keeps processes in step."""

    rows: StepRows
    number: int
    is_padding: bool = False


class StepRunner:
    """Runs steps and keeps count. micro: rows of one forward at most; it halves when memory runs out, and stays so.

    sums: per job since the last `drain`, summed loss and terms. tokens, padded, seconds: since the run began;
    processor_seconds: of all threads, which a busy machine does not stretch.
    spent: per job since the run began, seconds and processor seconds of its forwards and backwards; a forward that jobs
    share counts for each by its rows.
    """

    def __init__(self, kit: Kit, jobs: Sequence[Job], micro_batch_size: int) -> None:
        self.kit, self.jobs, self.num_halvings = kit, list(jobs), 0
        self.micro_batch_size = min(distributed.all_gather([micro_batch_size]))
        self.groups = [_forward_group(kit, job, number) for number, job in enumerate(jobs)]
        self.sums: list[list[float]] = [[0.0, 0.0] for _ in jobs]
        self.tokens = self.padded = 0
        self.seconds = self.processor_seconds = 0.0
        self.job_seconds: list[list[float]] = [[0.0, 0.0] for _ in jobs]

    def step(self, model: nn.Module, rows: StepRows, step: int, backward: Backward, no_sync: NoSync) -> Tensor:
        """The mean of the jobs' losses; gradients are left in the parameters, which had none."""
        start, spent = time.perf_counter(), time.process_time()
        while True:
            try:
                total = self._run_once(model, rows, step, backward, no_sync)
                break
            except (RuntimeError, MemoryError) as wrong:
                largest = max(len(part.rows) for part in self.micro_batches(rows))
                if not memory.is_out_of_memory(wrong) or largest == 1 or distributed.world_size() > 1:
                    raise
            model.zero_grad()
            self.micro_batch_size, self.num_halvings = (largest + 1) // 2, self.num_halvings + 1
            warnings.warn(
                f"memory ran out: going on with train.micro_batch_size={self.micro_batch_size}",
                RuntimeWarning,
                stacklevel=2,
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.seconds += time.perf_counter() - start
        self.processor_seconds += time.process_time() - spent
        return total

    def _run_once(self, model: nn.Module, rows: StepRows, step: int, backward: Backward, no_sync: NoSync) -> Tensor:
        norms = {j: self.jobs[j].num_targets(step) for j in {j for j, _ in rows}}
        parts = self.micro_batches(distributed.my_slice(rows))
        most = max(len(self.micro_batches(share)) for share in distributed.slices(rows))
        parts += [MicroBatch(rows[:1], 0, is_padding=True)] * (most - len(parts))
        sums = [[0.0, 0.0] for _ in self.jobs]
        tokens = padded = 0
        total = torch.zeros((), device=self.kit.device)
        for at, part in enumerate(parts):
            clocks = time.perf_counter(), time.process_time()
            with contextlib.nullcontext() if at == most - 1 else no_sync(model):
                found, batch = self._forward(model, part, norms, step)
                backward(found.total)
            passed = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
            for j, _ in part.rows:
                for k in (0, 1):
                    self.job_seconds[j][k] += passed[k] / len(part.rows)
            if part.is_padding:
                continue
            total += found.total.detach()
            tokens, padded = tokens + batch.num_tokens, padded + batch.num_padded_tokens
            for (j, _), value, of in zip(
                part.rows, found.per_example.tolist(), found.num_targets.tolist(), strict=True
            ):
                sums[j][0] += value
                sums[j][1] += of
        for kept, new in zip(self.sums, sums, strict=True):  # only now: a step that was tried again counts once
            kept[0], kept[1] = kept[0] + new[0], kept[1] + new[1]
        self.tokens, self.padded = self.tokens + tokens, self.padded + padded
        return total / len(norms)

    def micro_batches(self, rows: StepRows) -> list[MicroBatch]:
        """Micro-batches: jobs that may stand in one batch share them, each other one has its own."""
        together: dict[Hashable, StepRows] = {}
        for row in rows:
            together.setdefault(self.groups[row[0]], []).append(row)
        cuts = [(group, at) for group in together.values() for at in range(0, len(group), self.micro_batch_size)]
        return [MicroBatch(group[at : at + self.micro_batch_size], at // self.micro_batch_size) for group, at in cuts]

    def _forward(
        self, model: nn.Module, micro_batch: MicroBatch, num_targets: dict[int, int], step: int
    ) -> tuple[Losses, Batch]:
        device = self.kit.device
        owners = [self.jobs[j] for j, _ in micro_batch.rows]
        shares = [
            0.0 if micro_batch.is_padding else distributed.world_size() / max(1, num_targets[j])
            for j, _ in micro_batch.rows
        ]
        weights = torch.tensor(shares, device=device)
        worn = {job.name for job in owners}
        names: Any = worn.pop() if len(worn) == 1 else [job.name for job in owners]
        seeds = [combine_seeds(self.jobs[j].settings.seed, step, i) for j, i in micro_batch.rows]
        objective = owners[0].objective
        batch = objective.collate([self.jobs[j].examples[i] for j, i in micro_batch.rows], seeds)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), self.kit.use(names):
            torch.manual_seed(combine_seeds(owners[0].settings.seed, step, micro_batch.number, distributed.rank()))
            return objective.losses(model, batch, weights), batch

    def pop_losses(self) -> dict[str, float]:
        """Each job's loss per term since the last time, over all processes; a job without a term is left out."""
        sums = distributed.all_gather([self.sums])
        self.sums = [[0.0, 0.0] for _ in self.jobs]
        told = {}
        for j, job in enumerate(self.jobs):
            loss, terms = (sum(part[j][k] for part in sums) for k in (0, 1))
            if terms:
                told[job.name] = loss / terms
        return told

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; `counts` of every process, so all of them have to ask."""
        own = {"sums": self.sums, **{name: getattr(self, name) for name in PER_PROCESS_COUNTS}}
        times = {"seconds": self.seconds, "spent": self.job_seconds}
        return {
            "micro": self.micro_batch_size,
            "halved": self.num_halvings,
            "counts": distributed.all_gather([own]),
            **times,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """As it was; with other processes than before the counts are shared out."""
        self.micro_batch_size, self.num_halvings, self.seconds = state["micro"], state["halved"], state["seconds"]
        self.job_seconds = state.get("spent", self.job_seconds)  # a checkpoint written before has none
        own = distributed.my_slice(state["counts"])
        self.sums = [[sum(part["sums"][j][k] for part in own) for k in (0, 1)] for j in range(len(self.jobs))]
        for name in PER_PROCESS_COUNTS:
            setattr(self, name, sum(part.get(name, 0) for part in own))


def _forward_group(kit: Kit, job: Job, index: int) -> Hashable:
    """Jobs of the same group may share a forward: what they draw, learn and answer with is of one form."""
    form = job.objective.batch_key
    if form is None or not can_share_forward(kit[job.name]):
        return index
    heads = kit[job.name].heads
    return form, tuple((path, tuple(tuple(v.shape) for v in head.parameters())) for path, head in heads.items())


def combine_seeds(*seeds: int) -> int:
    """One seed from several, the same on every machine."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return seed
