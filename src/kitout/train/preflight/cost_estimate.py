"""What a run will take: its largest and its median step, run once for real before training starts.

Time is the median step's, by padded tokens, over all steps; memory is the largest step's peak and the optimizer's
state. A step that does not fit is halved here, before the run depends on it. It knows jobs and their cost, nothing of
their objectives.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kitout.base import memory
from kitout.kit import Kit
from kitout.train.loop import distributed
from kitout.train.loop.base_mode import training_mode
from kitout.train.loop.jobs import Job
from kitout.train.loop.step import StepRows, StepRunner

MEMORY_FRACTION = 0.85  # of the free memory that a step is planned to take
CPU_TOKENS = 1024  # padded tokens keep a CPU as busy as more of them, and take less memory


@dataclass(frozen=True)
class CostEstimate:
    """What all steps of a run are expected to take. Its field names are the keys of estimate.json and results.json."""

    seconds: float
    """Of all training steps, without evaluations."""
    memory: int
    """Peak bytes of the process, or of the GPU."""
    loaded: int
    """Bytes in use before the first step."""
    micro: int
    """Examples of one forward."""
    tokens: int
    """Of the whole run, padding included."""
    tokens_per_second: float
    """Of the median step, padding included."""


def estimate_cost(
    kit: Kit,
    jobs: Sequence[Job],
    steps: Sequence[StepRows],
    micro_batch_size: int | None,
    activation_checkpointing: bool = False,
) -> CostEstimate:
    """Runs two steps forward and backward and leaves no gradient behind."""
    costs = [_padded_tokens(jobs, rows) for rows in steps]
    largest = max(range(len(steps)), key=costs.__getitem__)
    median_cost = statistics.median(costs)
    median = min(range(len(steps)), key=lambda i: abs(costs[i] - median_cost))
    names = [job.name for job in jobs]
    num_trained = sum(value.numel() for name in names for value in kit[name].parameters())
    kit.train_only(*names)
    device = kit.device
    loaded = memory.current(device)
    statistics_before = {value: value.clone() for name in names for value in kit[name].buffers()}
    with training_mode(kit, names, activation_checkpointing):
        try:
            fitting = _rows_that_fit(kit, jobs, steps[largest], largest)
            num_rows = micro_batch_size or default_micro_batch(device, jobs, steps[largest])
            num_rows = min(num_rows, *distributed.all_gather([fitting]))  # the same in all processes
            memory.reset_peak(device)
            largest_run = _run_step(kit, jobs, steps[largest], largest, num_rows)
            peak = memory.peak(device) + 8 * num_trained  # AdamW's two moments
            median_run = _run_step(kit, jobs, steps[median], median, largest_run.micro_batch_size)
        finally:
            for name in names:
                kit[name].zero_grad()
            for value, before in statistics_before.items():  # a BatchNorm has seen steps that do not count
                value.copy_(before)
    speed = costs[median] / max(median_run.seconds, 1e-9)
    return CostEstimate(sum(costs) / speed, peak, loaded, largest_run.micro_batch_size, sum(costs), speed)


def default_micro_batch(device: torch.device, jobs: Sequence[Job], rows: StepRows) -> int:
    """Rows of one forward: all of them on a GPU; on a CPU equal parts that are just large enough, of whole jobs."""
    if device.type == "cuda":
        return len(rows)
    of_job = max(Counter(j for j, _ in rows).values())
    tokens = _padded_tokens(jobs, rows) * of_job / len(rows)  # of the job with most rows
    if tokens > CPU_TOKENS:
        return math.ceil(of_job / math.ceil(tokens / CPU_TOKENS))
    num_jobs = len({j for j, _ in rows})
    return of_job * math.ceil(num_jobs / math.ceil(num_jobs / (CPU_TOKENS // tokens)))


def _padded_tokens(jobs: Sequence[Job], rows: StepRows) -> int:
    """Tokens of a step if all its rows are as long as the longest."""
    sizes = [jobs[j].objective.num_tokens(jobs[j].examples[i]) for j, i in rows]
    return len(sizes) * max(sizes)


def _rows_that_fit(kit: Kit, jobs: Sequence[Job], rows: StepRows, step: int) -> int:
    """How many rows of this step fit into the free memory, by what one row takes; all, where that is not known."""
    available = memory.available(kit.device)
    if available is None or kit.device.type == "cuda":
        return len(rows)  # a GPU says so itself when it is full, and the step is tried again in halves
    before = memory.current(kit.device)
    memory.reset_peak(kit.device)
    two_rows = [row for row in rows if jobs[row[0]].settings.head == "batchnorm"][:2]  # one row has no variance
    first_rows = two_rows or rows[:1]
    _run_step(kit, jobs, first_rows, step, len(first_rows))
    bytes_per_row = max(1, (memory.peak(kit.device) - before) // len(first_rows))
    return max(1, min(len(rows), int(MEMORY_FRACTION * available / bytes_per_row)))


def _run_step(kit: Kit, jobs: Sequence[Job], rows: StepRows, step: int, micro_batch_size: int) -> StepRunner:
    runner = StepRunner(kit, jobs, micro_batch_size)
    runner.step(kit, rows, step, torch.Tensor.backward, lambda _model: contextlib.nullcontext())
    return runner
