"""What a run will take: its largest and its usual step, run once for real before anything is learnt.

Time is the usual step's, by padded tokens, over the whole plan; memory is the largest step's peak and the optimiser's
state. A step that does not fit is halved here, before the run depends on it. It knows jobs and their cost, nothing of
what they learn.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kitout.base import memory
from kitout.kit import Kit
from kitout.train.loop import distributed
from kitout.train.loop.base_mode import training_mode
from kitout.train.loop.jobs import Job
from kitout.train.loop.step import StepRows, StepRunner

MEMORY_FRACTION = 0.85  # of the free memory a step may be expected to take
CPU_TOKENS = 1024  # padded tokens keep a CPU as busy as more of them, and take less memory


@dataclass(frozen=True)
class CostEstimate:
    """seconds: of all training steps, without evaluations. memory: peak bytes of the process, or of the GPU.

    loaded: bytes held before. micro: rows of one forward. tokens: of the whole run, padding included.
    """

    seconds: float
    memory: int
    loaded: int
    micro: int
    tokens: int
    tokens_per_second: float


def estimate_cost(
    kit: Kit,
    jobs: Sequence[Job],
    steps: Sequence[StepRows],
    micro_batch_size: int | None,
    activation_checkpointing: bool = False,
) -> CostEstimate:
    """Runs two steps forward and backward and takes their gradients away again."""
    costs = [_padded_tokens(jobs, rows) for rows in steps]
    largest = max(range(len(steps)), key=costs.__getitem__)
    usual = min(range(len(steps)), key=lambda i: abs(costs[i] - statistics.median(costs)))
    names = [job.name for job in jobs]
    trained = sum(value.numel() for name in names for value in kit[name].parameters())
    kit.train_only(*names)
    device = kit.device
    loaded = memory.current(device)
    statistics_before = {value: value.clone() for name in names for value in kit[name].buffers()}
    with training_mode(kit, names, activation_checkpointing):
        try:
            fitting = min(
                distributed.all_gather([_rows_that_fit(kit, jobs, steps[largest], largest)])
            )  # the same for all
            rows = min(micro_batch_size or default_micro_batch(device, jobs, steps[largest]), fitting)
            memory.reset_peak(device)
            first = _run_step(kit, jobs, steps[largest], largest, rows)
            most = memory.peak(device) + 8 * trained  # AdamW's two moments
            again = _run_step(kit, jobs, steps[usual], usual, first.micro_batch_size)
        finally:
            for name in names:
                kit[name].zero_grad()
            for value, before in statistics_before.items():  # a BatchNorm has seen steps that do not count
                value.copy_(before)
    speed = costs[usual] / max(again.seconds, 1e-9)
    return CostEstimate(sum(costs) / speed, most, loaded, first.micro_batch_size, sum(costs), speed)


def default_micro_batch(device: torch.device, jobs: Sequence[Job], rows: StepRows) -> int:
    """Rows of one forward: all of them on a GPU, on a CPU equal parts that are just large enough."""
    if device.type == "cuda":
        return len(rows)
    parts = math.ceil(_padded_tokens(jobs, rows) / CPU_TOKENS)
    return math.ceil(len(rows) / parts)


def _padded_tokens(jobs: Sequence[Job], rows: StepRows) -> int:
    """Tokens of a step if all its rows are as long as the longest."""
    sizes = [jobs[j].objective.num_tokens(jobs[j].examples[i]) for j, i in rows]
    return len(sizes) * max(sizes)


def _rows_that_fit(kit: Kit, jobs: Sequence[Job], rows: StepRows, step: int) -> int:
    """How many rows of this step fit into the free memory, by what one row takes; all, where nobody can say."""
    room = memory.available(kit.device)
    if room is None or kit.device.type == "cuda":
        return len(rows)  # a GPU says so itself when it is full, and the step is tried again in halves
    before = memory.current(kit.device)
    memory.reset_peak(kit.device)
    several = [row for row in rows if jobs[row[0]].settings.head == "batchnorm"][:2]  # one row has no variance
    few = several or rows[:1]
    _run_step(kit, jobs, few, step, len(few))
    each = max(1, (memory.peak(kit.device) - before) // len(few))
    return max(1, min(len(rows), int(MEMORY_FRACTION * room / each)))


def _run_step(kit: Kit, jobs: Sequence[Job], rows: StepRows, step: int, micro_batch_size: int) -> StepRunner:
    work = StepRunner(kit, jobs, micro_batch_size)
    work.step(kit, rows, step, torch.Tensor.backward, lambda _model: contextlib.nullcontext())
    return work
