"""(i) Eight jobs on one frozen base at once, against one after the other: LoRAs of ranks 4 to 32, and 8 methods.

SmolLM2-135M's shape with random values, two short rows a step and job, as long as tweets in instruction form: all begin
with the same 22 tokens, and two tokens of each are trained. Everything is the loop's own: batches by length, micro-
batches, clipping, AdamW, dtype and attention as `kitout train` chooses them here. `SETS` of steps run in turn, round
after round. What one job alone loses in overhead is in the detail: seconds a step of one job, and of all.
"""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import SMOL, Line, Times, smollm2
from transformers import TrainerCallback, TrainingArguments

import kitout
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.batch_plan import plan_batches
from kitout.train.loop.jobs import Job
from kitout.train.loop.trainer import JobTrainer, StepDataset
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.preflight.cost_estimate import default_micro_batch
from kitout.train.setup import device

BATCH, STEPS, EXAMPLES = 2, 8, 16  # rows of a job's step, steps, rows of a job
INSTRUCTION, LONGEST, TRAINED = 22, 62, 2  # tokens
RANKS = (4, 8, 8, 12, 16, 16, 24, 32)
METHODS = {
    "LoRA": kitout.LoRA(rank=8, targets="all-linear"),
    "DoRA": kitout.LoRA(rank=8, targets="all-linear", dora=True),
    "IA3": kitout.IA3(),
    "BitFit": kitout.BitFit(),
    "AdaptFormer": kitout.AdaptFormer(),
    "Houlsby": kitout.Houlsby(),
    "ParallelAdapter": kitout.ParallelAdapter(),
    "prefix": kitout.PrefixTuning(length=20),
}
LORAS = {f"rank-{rank}-{k}": kitout.LoRA(rank=rank, alpha=16, targets="all-linear") for k, rank in enumerate(RANKS)}
CASES = {
    "8 LoRA jobs of ranks 4 to 32 at once, throughput against one after the other": (LORAS, 1.8),
    "8 jobs of different methods at once, throughput against one after the other": (METHODS, 1.5),
}


class Clock(TrainerCallback):
    """Seconds from the first step's beginning to the last one's end."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = self.start or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def rows(count: int, seed: int) -> list[EncodedExample]:
    """Random ids behind one instruction, as long as tweets."""
    draw = random.Random(seed)
    instruction = [random.Random(0).randrange(1000) for _ in range(INSTRUCTION)]
    items = []
    for _ in range(count):
        own = min(LONGEST, max(12, round(draw.gauss(40, 12))))
        ids = (*instruction, *(draw.randrange(1000) for _ in range(own)))
        labels = (*[IGNORE_INDEX] * (len(ids) - TRAINED), *ids[-TRAINED:])
        items.append(EncodedExample(ids, labels, prompt_length=len(ids) - TRAINED))
    return items


def build_jobs(methods: dict[str, Any], blocks: int, dtype: torch.dtype, steps: int) -> tuple[kitout.Kit, list[Job]]:
    kit = kitout.attach(smollm2(dtype, blocks))
    kit.base.set_attn_implementation("eager")  # as `kitout train` at this length
    for seed, (name, method) in enumerate(methods.items()):
        kit.add(name, method, seed=seed)
    kit.eval()
    jobs = []
    for seed, name in enumerate(methods):
        own, objective = rows(EXAMPLES, seed), CausalLM(kit)
        with kit.use(name):
            objective.choose_head_loss(list(methods), own[:2])
        batches = plan_batches([len(item.input_ids) for item in own], BATCH, steps, seed)
        jobs.append(Job(name, objective, own, batches, TrainConfig(lr=1e-3, batch_size=BATCH, warmup_ratio=0.0)))
    return kit, jobs


def timed_run(kit: kitout.Kit, jobs: Sequence[Job]) -> Callable[[], float]:
    """A run of the loop over these jobs; every call starts anew but for the adapters' values."""
    clock = Clock()

    def run_once() -> float:
        args = TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=len(jobs[0].batches), per_device_train_batch_size=1,
            report_to="none", logging_steps=1, disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
            save_strategy="no",
        )  # fmt: skip
        micro = default_micro_batch(kit.device, jobs, StepDataset(jobs)[0])
        JobTrainer(kit, jobs, Path(tempfile.mkdtemp()), args, callbacks=[clock], micro_batch_size=micro).train()
        return clock.seconds

    return run_once


def measure(
    methods: dict[str, Any], rounds: int, blocks: int, dtype: torch.dtype, steps: int
) -> tuple[Times, dict[str, float]]:
    """Seconds of both ways by round, and the best of each job alone."""
    kit, jobs = build_jobs(methods, blocks, dtype, steps)
    joint = timed_run(kit, jobs)
    alone = {job.name: timed_run(kit, [job]) for job in jobs}
    times, best = Times({"at once": [], "in turn": []}), dict.fromkeys(alone, float("inf"))
    for _ in range(rounds):
        times.rounds["at once"].append(joint())
        each = {name: one() for name, one in alone.items()}
        best = {name: min(best[name], seconds) for name, seconds in each.items()}
        times.rounds["in turn"].append(sum(each.values()))
    return times, best


def run(rounds: int = 5, blocks: int = SMOL.num_hidden_layers, steps: int = STEPS) -> list[Line]:
    warnings.simplefilter("ignore")
    dtype = device.choose_dtype("auto", torch.device("cpu"))[0]
    lines = []
    for label, (methods, least) in CASES.items():
        times, best = measure(methods, rounds, blocks, dtype, steps)
        ratio = times.ratio("in turn", "at once")
        detail = f"{times.best('at once') / steps:.3f} s a step at once; alone "
        detail += ", ".join(f"{name} {seconds / steps:.3f}" for name, seconds in best.items())
        measured = times.ratio_text("in turn", "at once")
        lines.append(Line(label, measured, f">= {least} x", ratio >= least, f"{dtype}; {detail}"))
    return lines
