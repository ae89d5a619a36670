"""One optimizer step's forward and backward: rows of all jobs, cut into micro-batches, under one exact normalization.

A step is one sum over its target tokens. How it is cut (micro-batches, processes, smaller batches after memory ran out)
does not change what it is a sum of, and every random draw follows from a job's seed and the step. It knows jobs and
objectives, and nothing of optimizers, files or the loop.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base import memory
from kitout.kit import Kit
from kitout.train.loop import distributed, metric_sums
from kitout.train.loop.compiled_steps import SAMPLED_STEPS, CompiledSteps
from kitout.train.loop.jobs import Job, cut_between_jobs, forward_key
from kitout.train.loop.metric_sums import MetricSums
from kitout.train.objectives.objective import Batch, Losses, StepObjective
from kitout.train.trunk.kept_inputs import within_trunk

StepRows = list[tuple[int, int]]  # (index of the job, index of its example)
Backward = Callable[[Tensor], Any]
NoSync = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]  # this backward's gradients are not all-reduced
PER_PROCESS_COUNTS = ("tokens", "padded", "processor_seconds")  # each process counts its own


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward."""

    rows: StepRows
    """Whose examples they are."""
    number: int
    """Its position among the micro-batches of its jobs: what is drawn at random in it follows from this."""
    is_padding: bool = False
    """It repeats a row with weight 0, so that every process runs equally many; it is counted nowhere."""


@dataclass
class StepResult:
    """What the micro-batches of one step come to in this process."""

    total: Tensor
    """The sum of the jobs' mean losses."""
    sums: list[list[float]]
    """Per job [summed loss, number of targets]."""
    metrics: MetricSums
    """Per job, of what its objective measures of each example."""
    tokens: int = 0
    """Tokens without padding."""
    padded: int = 0
    """Tokens with padding."""


@dataclass
class Stopwatch:
    """Seconds of the wall clock and of the processor since it was started."""

    started: tuple[float, float] = field(default_factory=lambda: (time.perf_counter(), time.process_time()))
    """Both clocks at the start; the processor's adds up all threads and stands still while the process waits."""

    def elapsed(self) -> tuple[float, float]:
        """(wall seconds, processor seconds)."""
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]


class StepRunner:
    """Runs steps and counts what they did.

    Two pairs of clocks run. `seconds` and `processor_seconds` are the run's: whole steps, retries and the work around
    the forwards included. `job_seconds` is split by job: each job's own forwards and backwards, where a micro-batch
    that jobs share is charged to them by their rows, and padding to the job whose row it repeats. So the jobs' sum is
    less than the run's. All are of the whole run, resumes included; a forward that fails for memory is in the run's
    time alone.
    """

    micro_batch_size: int
    """Rows of one forward at most; it is halved when memory runs out and stays so."""
    num_halvings: int
    """How often memory ran out."""
    groups: list[Hashable]
    """By job; jobs of the same group share forwards."""
    sums: list[list[float]]
    """Per job [summed loss, number of targets] since the last `pop_losses`; of this process."""
    metrics: MetricSums
    """What the objectives measured of each example since the last `pop_metrics`; of this process."""
    tokens: int
    """Tokens without padding since the run began; of this process."""
    padded: int
    """Tokens with padding since the run began; of this process."""
    seconds: float
    """Wall-clock seconds of all steps since the run began."""
    processor_seconds: float
    """Processor seconds of all steps since the run began, over all threads of this process; a busy machine does not
    stretch them."""
    job_seconds: list[list[float]]
    """Per job [wall seconds, processor seconds] of its own forwards and backwards since the run began."""
    compiled: CompiledSteps
    """How blocks are compiled and batches padded (train.compile, train.pad_to)."""

    def __init__(self, kit: Kit, jobs: Sequence[Job], micro_batch_size: int) -> None:
        self.kit, self.jobs, self.num_halvings = kit, list(jobs), 0
        self.micro_batch_size = min(distributed.all_gather([micro_batch_size]))
        self.groups = [_forward_group(kit, job, number) for number, job in enumerate(jobs)]
        self.sums = [[0.0, 0.0] for _ in jobs]
        self.metrics = [{} for _ in jobs]
        self.tokens = self.padded = 0
        self.seconds = self.processor_seconds = 0.0
        self.job_seconds = [[0.0, 0.0] for _ in jobs]
        self.compiled = CompiledSteps(kit, jobs)

    def step(self, model: nn.Module, rows: StepRows, step: int, backward: Backward, no_sync: NoSync) -> Tensor:
        """The mean of the jobs' losses; gradients are left in the parameters, which had none."""
        watch = Stopwatch()
        self._before_step(model, rows, step)
        while True:
            try:
                result = self._run_once(model, rows, step, backward, no_sync)
                break
            except (RuntimeError, MemoryError) as error:
                largest = max(len(micro_batch.rows) for micro_batch in self.micro_batches(rows))
                if not memory.is_out_of_memory(error) or largest == 1 or distributed.world_size() > 1:
                    raise
            model.zero_grad()
            self.micro_batch_size, self.num_halvings = (largest + 1) // 2, self.num_halvings + 1
            warnings.warn(
                f"out of memory: continuing with train.micro_batch_size={self.micro_batch_size}",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self._count(result)  # only now: a step that was retried counts once
        wall, processor = watch.elapsed()
        self.seconds += wall
        self.processor_seconds += processor
        return result.total / len({j for j, _ in rows})

    def compiled_blocks(self, steps: Sequence[StepRows]) -> contextlib.AbstractContextManager[None]:
        """The blocks are compiled while these steps run, if the run asks for it."""
        sampled = range(0, len(steps), max(1, len(steps) // SAMPLED_STEPS))
        examples = (
            [self.jobs[j].examples[i] for j, i in micro_batch.rows]
            for number in sampled
            for micro_batch in self.micro_batches(distributed.my_slice(steps[number]))
        )
        return self.compiled.running(examples, len(set(self.groups)))

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what is done for a step before it, as making its examples: of the run, and of its first job."""
        watch = Stopwatch()
        yield
        wall, processor = watch.elapsed()
        self.seconds += wall
        self.processor_seconds += processor
        self.job_seconds[0][0] += wall
        self.job_seconds[0][1] += processor

    def _before_step(self, model: nn.Module, rows: StepRows, step: int) -> None:
        """Lets the objectives that ask for it see their job's whole step, in every process alike."""
        for j in dict.fromkeys(j for j, _ in rows):
            job = self.jobs[j]
            if not isinstance(job.objective, StepObjective):
                continue
            watch = Stopwatch()
            with self._route(job.name, combine_seeds(job.settings.seed, step)), torch.no_grad():
                job.objective.before_step(model, [job.examples[i] for of_job, i in rows if of_job == j], step)
            for clock, seconds in enumerate(watch.elapsed()):
                self.job_seconds[j][clock] += seconds

    @contextlib.contextmanager
    def _route(self, route: Any, seed: int) -> Iterator[None]:
        """These adapters are active, and random draws follow from the seed; afterwards all is as before."""
        device = self.kit.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), self.kit.use(route):
            torch.manual_seed(seed)
            yield

    def _run_once(self, model: nn.Module, rows: StepRows, step: int, backward: Backward, no_sync: NoSync) -> StepResult:
        """Forward and backward of this process's micro-batches; nothing but the jobs' clocks is counted yet."""
        num_targets = {j: self.jobs[j].num_targets(step) for j in {j for j, _ in rows}}
        micro_batches = self._micro_batches_of_process(rows)
        zero = torch.zeros((), device=self.kit.device)
        result = StepResult(zero, [[0.0, 0.0] for _ in self.jobs], [{} for _ in self.jobs])
        for micro_batch in micro_batches:
            watch = Stopwatch()
            is_last = micro_batch is micro_batches[-1]
            with contextlib.nullcontext() if is_last else no_sync(model):
                losses, batch = self._forward(model, micro_batch, num_targets, step)
                total = losses.total + self._penalty(micro_batch, rows)
                with self.compiled.around(batch):  # recomputations run as their forwards did
                    backward(total)
            for clock, seconds in enumerate(watch.elapsed()):
                for j, _ in micro_batch.rows:
                    self.job_seconds[j][clock] += seconds / len(micro_batch.rows)
            if micro_batch.is_padding:
                continue
            result.total += total.detach()
            result.tokens += batch.num_tokens
            result.padded += batch.num_padded_tokens
            by_row = zip(micro_batch.rows, losses.per_example.tolist(), losses.num_targets.tolist(), strict=True)
            for (j, _), loss, targets in by_row:
                result.sums[j][0] += loss
                result.sums[j][1] += targets
            metric_sums.add_examples(result.metrics, [j for j, _ in micro_batch.rows], losses.metrics or {})
        return result

    def _count(self, result: StepResult) -> None:
        for counted, (loss, targets) in zip(self.sums, result.sums, strict=True):
            counted[0] += loss
            counted[1] += targets
        metric_sums.add_sums(self.metrics, result.metrics)
        self.tokens += result.tokens
        self.padded += result.padded

    def micro_batches(self, rows: StepRows) -> list[MicroBatch]:
        """Jobs of one group share micro-batches, each other job has its own."""
        by_group: dict[Hashable, StepRows] = {}
        for row in rows:
            by_group.setdefault(self.groups[row[0]], []).append(row)
        return [
            MicroBatch(part, number)
            for group in map(self._longest_jobs_first, by_group.values())
            for number, part in enumerate(cut_between_jobs(group, self.micro_batch_size))
        ]

    def _longest_jobs_first(self, rows: StepRows) -> StepRows:
        """Rows in the order of their jobs' longest, where they are cut: a forward is padded to its longest row."""
        if len(rows) <= self.micro_batch_size:
            return rows
        longest: Counter[int] = Counter()
        for j, i in rows:
            longest[j] = max(longest[j], self.jobs[j].objective.num_tokens(self.jobs[j].examples[i]))
        return sorted(rows, key=lambda row: -longest[row[0]])

    def _micro_batches_of_process(self, rows: StepRows) -> list[MicroBatch]:
        """Those of this process, padded to the same number in all processes, since gradients are averaged together."""
        micro_batches = self.micro_batches(distributed.my_slice(rows))
        most = max(len(self.micro_batches(per_process)) for per_process in distributed.slices(rows))
        return micro_batches + [MicroBatch(rows[:1], 0, is_padding=True) for _ in range(most - len(micro_batches))]

    def _forward(
        self, model: nn.Module, micro_batch: MicroBatch, num_targets: dict[int, int], step: int
    ) -> tuple[Losses, Batch]:
        device = self.kit.device
        jobs = [self.jobs[j] for j, _ in micro_batch.rows]
        objective = jobs[0].objective
        scale = 0.0 if micro_batch.is_padding else float(distributed.world_size())  # gradients are averaged over these
        weights = torch.tensor([scale / max(1, num_targets[j]) for j, _ in micro_batch.rows], device=device)
        names = [job.name for job in jobs for _ in range(objective.rows)]
        route: Any = names if len(set(names)) > 1 else names[0]
        seeds = [combine_seeds(self.jobs[j].settings.seed, step, i) for j, i in micro_batch.rows]
        items = [self.jobs[j].examples[i] for j, i in micro_batch.rows]
        with self.compiled.padding():
            batch = objective.collate(items, seeds)
        seed = combine_seeds(jobs[0].settings.seed, step, micro_batch.number, distributed.rank())
        with self._route(route, seed), within_trunk(self.kit, objective, items, batch), self.compiled.around(batch):
            return objective.losses(model, batch, weights), batch

    def _penalty(self, micro_batch: MicroBatch, rows: StepRows) -> Tensor | float:
        """A micro-batch's share of what the jobs' adapters add to their losses, once per step (`Delta.penalty`)."""
        total: Tensor | float = 0.0
        if micro_batch.is_padding:
            return total
        here, everywhere = (Counter(j for j, _ in each) for each in (micro_batch.rows, rows))
        for j, count in here.items():
            penalty = self.kit[self.jobs[j].name].penalty()
            if penalty is not None:
                total = total + penalty * (distributed.world_size() * count / everywhere[j])
        return total

    def pop_losses(self) -> dict[str, float]:
        """Each job's loss per target since the last call, over all processes; a job without a target is left out."""
        per_process = distributed.all_gather([self.sums])
        self.sums = [[0.0, 0.0] for _ in self.jobs]
        losses = {}
        for j, job in enumerate(self.jobs):
            loss, targets = (sum(sums[j][k] for sums in per_process) for k in (0, 1))
            if targets:
                losses[job.name] = loss / targets
        return losses

    def pop_metrics(self) -> dict[str, float]:
        """Each metric's mean per example since the last call, over all processes; "<job>/<name>" if several jobs."""
        per_process = distributed.all_gather([self.metrics])
        self.metrics = [{} for _ in self.jobs]
        total = metric_sums.total(per_process, len(self.jobs))
        prefixes = [f"{job.name}/" if len(self.jobs) > 1 else "" for job in self.jobs]
        return {
            f"{prefix}{name}": value / count
            for prefix, of_job in zip(prefixes, total, strict=True)
            for name, (value, count) in of_job.items()
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint. `counts` has every process's own, so all processes have to call it."""
        own = {"sums": self.sums, "metrics": self.metrics, **{name: getattr(self, name) for name in PER_PROCESS_COUNTS}}
        return {
            "micro": self.micro_batch_size,
            "halved": self.num_halvings,
            "counts": distributed.all_gather([own]),
            "seconds": self.seconds,
            "spent": self.job_seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes a checkpoint's state over; with another number of processes the counts are divided among them."""
        self.micro_batch_size, self.num_halvings, self.seconds = state["micro"], state["halved"], state["seconds"]
        self.job_seconds = state.get("spent", self.job_seconds)  # not in checkpoints of earlier versions
        counts = distributed.my_slice(state["counts"])
        self.sums = [[sum(own["sums"][j][k] for own in counts) for k in (0, 1)] for j in range(len(self.jobs))]
        per_process = [own["metrics"] for own in counts if "metrics" in own]  # not in those of earlier versions
        self.metrics = metric_sums.total(per_process, len(self.jobs))
        for name in PER_PROCESS_COUNTS:
            setattr(self, name, sum(own.get(name, 0) for own in counts))


def _forward_group(kit: Kit, job: Job, index: int) -> Hashable:
    """Jobs of one group may share a forward: the same key, and heads of the same shapes."""
    key = forward_key(job, kit[job.name])
    if key is None:
        return index
    heads = kit[job.name].heads
    return (
        key,
        job.objective.rows,
        tuple((path, tuple(tuple(v.shape) for v in head.parameters())) for path, head in heads.items()),
    )


def combine_seeds(*seeds: int) -> int:
    """One seed from several, the same on every machine."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return seed
