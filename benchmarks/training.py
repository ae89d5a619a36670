"""(g) `kitout train`'s loop against TRL's SFTTrainer with PEFT.

SmolLM2-135M with its real weights, LoRA r=8 on every linear, batch 16, tweets in instruction form and BoolQ, the same
trained tokens for all. kitout has the dtype and attention that `kitout train` chooses by itself. TRL is tuned over
float32 and bfloat16, eager and sdpa, grouped by length, without checkpointing, and its fastest is taken. Speed is real
(unpadded) tokens a second over whole epochs of a few steps, in turn. Memory is the peak above the loaded model, each
case in a process of its own. Needs the assets of `make demo`. SETS=tweets leaves the rest out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import SMOL, Line, Times, share_of_peak
from loop_step import frozen_step
from train_step import same_values
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

import kitout
from kitout import LoRA
from kitout.assets import store
from kitout.base import memory
from kitout.data.encode.generation import CausalEncoder
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.read.sources import load_examples
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.batch_plan import plan_batches
from kitout.train.loop.jobs import Job
from kitout.train.loop.trainer import JobTrainer, StepDataset
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.preflight.cost_estimate import default_micro_batch
from kitout.train.setup import device
from kitout.train.setup.base_model import EAGER_BELOW_TOKENS

BATCH = 16
TWEETS = "Classify the sentiment of this tweet as negative, neutral or positive."
ALL_SETS = {"tweets": ("tweets", TWEETS), "boolq": ("boolq", None)}
SETS = {name: ALL_SETS[name] for name in os.environ.get("SETS", "tweets boolq").split()}
STEPS = {"tweets": 4, "boolq": 2}
MAX_LENGTH = 256
Case = Callable[[], float]


@dataclass(frozen=True)
class Tuning:
    """How TRL loads the base."""

    dtype: torch.dtype
    """Of the frozen weights."""
    attention: str
    """Implementation of attention."""

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.attention}"


TUNINGS = [Tuning(dtype, attention) for dtype in (torch.float32, torch.bfloat16) for attention in ("eager", "sdpa")]


def folder() -> Path:
    return store.fetch_asset("smollm2-135m", print)


def items(name: str, count: int) -> list[EncodedExample]:
    """Some examples of a data set, sampled by a seed, encoded once for all."""
    asset, instruction = SETS[name]
    source = store.fetch_asset(asset, print)
    file = source / "train.jsonl" if (source / "train.jsonl").exists() else source
    examples = next(iter(load_examples(file, system_prompt=instruction, limit=count).splits.values()))
    tokenizer = AutoTokenizer.from_pretrained(folder())
    return CausalEncoder(tokenizer, MAX_LENGTH)(examples)


def base(dtype: torch.dtype, attention: str | None = None) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype, attn_implementation=attention)


class Clock(TrainerCallback):
    """Seconds from the first step's beginning to the last one's end, and the losses logged."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.losses: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = self.start or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


def trl(examples: list[EncodedExample], tuning: Tuning | None) -> tuple[Case, Clock]:
    trainer, clock = peer(examples, tuning)

    def run() -> float:
        trainer.train()
        return clock.seconds

    return run, clock


def peer(examples: list[EncodedExample], tuning: Tuning | None, **more: Any) -> tuple[Any, Clock]:
    """TRL's trainer over these examples; tuning: None for its defaults."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list(
        [
            {"input_ids": list(i.input_ids), "completion_mask": [int(v != IGNORE_INDEX) for v in i.labels]}
            for i in examples
        ]
    )
    settings: dict[str, Any] = more
    if tuning is not None:
        settings |= {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-3,
        completion_only_loss=True, max_length=MAX_LENGTH, bf16=False, use_cpu=True, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    clock = Clock()
    trainer = SFTTrainer(
        model=base(torch.float32) if tuning is None else base(tuning.dtype, tuning.attention), args=args,
        train_dataset=rows, callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(folder()),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    return trainer, clock


def build_jobs(kit: kitout.Kit, examples: list[EncodedExample], names: list[str], batch: int, steps: int) -> list[Job]:
    share = len(examples) // len(names)
    jobs = []
    for k, name in enumerate(names):
        own = examples[k * share : (k + 1) * share]
        objective = CausalLM(kit)
        with kit.use(name):
            objective.choose_head_loss(names, own[:2])
        batches = plan_batches([len(i.input_ids) for i in own], batch, steps, k)
        jobs.append(Job(name, objective, own, batches, TrainConfig(lr=1e-3, batch_size=batch, warmup_ratio=0.0)))
    return jobs


def build_kit(names: list[str], examples: list[EncodedExample], dtype: torch.dtype | None = None) -> kitout.Kit:
    """A kit as `kitout train` loads it for these examples on this machine; dtype: float32 with sdpa, to compare."""
    chosen = dtype or device.choose_dtype("auto", torch.device("cpu"))[0]
    kit = kitout.attach(base(chosen))
    median = sorted(len(i.input_ids) for i in examples)[len(examples) // 2]
    if dtype is None and median < EAGER_BELOW_TOKENS:
        kit.base.set_attn_implementation("eager")
    for k, name in enumerate(names):
        kit.add(name, LoRA(rank=8, alpha=16, targets="all-linear"), seed=k)
    return kit.eval()


def timed_run(kit: kitout.Kit, jobs: list[Job]) -> tuple[Case, Clock]:
    """A run of the loop over these jobs; every call starts anew but for the adapters' values."""
    clock = Clock()

    def run() -> float:
        args = TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=len(jobs[0].batches), per_device_train_batch_size=1,
            report_to="none", logging_steps=1, disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
            save_strategy="no",
        )  # fmt: skip
        micro = default_micro_batch(kit.device, jobs, StepDataset(jobs)[0])
        JobTrainer(kit, jobs, Path(tempfile.mkdtemp()), args, callbacks=[clock], micro_batch_size=micro).train()
        return clock.seconds

    return run, clock


def in_turn(cases: Mapping[str, Case], rounds: int) -> Times:
    """The seconds that each case returns, round after round."""
    times = Times({name: [] for name in cases})
    for _ in range(rounds):
        for name, one in cases.items():
            times.rounds[name].append(one())
    return times


CASES = ("kitout", "TRL tuned", "TRL defaults")


def case(which: str, name: str, tuning: Tuning | None = None) -> tuple[Case, Clock, int]:
    examples = items(name, BATCH * STEPS[name])
    tokens = sum(len(i.input_ids) for i in examples)
    if which != "kitout":
        return (*trl(examples, tuning), tokens)
    kit = build_kit(["a"], examples)
    return (*timed_run(kit, build_jobs(kit, examples, ["a"], BATCH, STEPS[name])), tokens)


def fastest_tuning(name: str) -> tuple[Tuning, str]:
    """TRL's fastest settings here, by a round of each, and the figures of all."""
    cases = {str(tuning): case("TRL tuned", name, tuning) for tuning in TUNINGS}
    clocked = in_turn({tuning: one[0] for tuning, one in cases.items()}, 1)
    rates = {str(tuning): cases[str(tuning)][2] / clocked.best(str(tuning)) for tuning in TUNINGS}
    best = max(TUNINGS, key=lambda tuning: rates[str(tuning)])
    return best, "TRL tuned, tokens/s: " + ", ".join(f"{tuning} {rate:.0f}" for tuning, rate in rates.items())


def run(rounds: int = 3, short: bool = False) -> Iterator[Line]:
    """short: one step of tweets against TRL tuned."""
    if short:
        STEPS["tweets"] = 1
        tuning, tried = fastest_tuning("tweets")
        yield from speed("tweets", tuning, tried, rounds, ("TRL tuned",))
        return
    for name in SETS:
        tuning, tried = fastest_tuning(name)
        yield from speed(name, tuning, tried, rounds)
        yield from peak_memory(name, tuning)
    if SETS == ALL_SETS:
        yield from curves()


def speed(
    name: str, tuning: Tuning, tried: str, rounds: int, peers: Sequence[str] = ("TRL defaults", "TRL tuned")
) -> list[Line]:
    settings = {"kitout": None, "TRL tuned": tuning, "TRL defaults": None}
    cases = {which: case(which, name, settings[which]) for which in CASES if which in ("kitout", *peers)}
    clocked = in_turn({which: one[0] for which, one in cases.items()} | {"floor": floor(name)}, rounds)
    tokens = cases["kitout"][2]
    rates = {which: tokens / clocked.best(which) for which in cases}
    dtype = device.choose_dtype("auto", torch.device("cpu"))[0]
    share = share_of_peak(SMOL, rates["kitout"], dtype, rows=1024)
    share += f"; the frozen model's own steps, whole rows, {tokens / clocked.best('floor'):.0f} tokens/s"
    detail = ", ".join(f"{which} {rate:.0f} tokens/s" for which, rate in rates.items()) + f"; {share}; {tried}"
    lines = []
    for to in peers:
        minimum = {"TRL defaults": 3.5, "TRL tuned": 2.0}[to]
        ratio = clocked.ratio(to, "kitout")
        measured = f"{ratio:.2f} x (median of rounds {clocked.paired(to, 'kitout'):.2f})"
        lines.append(Line(f"{name}: tokens/s against {to}", measured, f">= {minimum} x", ratio >= minimum, detail))
        detail = ""
    return lines


def floor(name: str) -> Case:
    """Forward and backward of the frozen model over the same rows in the same steps, with the same loss."""
    examples = items(name, BATCH * STEPS[name])
    kit = build_kit([], examples)
    objective = CausalLM(kit)
    steps = plan_batches([len(i.input_ids) for i in examples], BATCH, STEPS[name], 0)
    passes = [frozen_step(kit, objective.collate([examples[i] for i in rows], None)) for rows in steps]

    def run() -> float:
        start = time.perf_counter()
        for one in passes:
            one()
        return time.perf_counter() - start

    return run


def peak_memory(name: str, tuning: Tuning) -> list[Line]:
    """Peak memory above the loaded model, each in its own process."""
    peaks = {}
    for which in ("kitout", "TRL tuned"):
        command = [sys.executable, __file__, which, name, str(TUNINGS.index(tuning))]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[which] = json.loads(out.strip().splitlines()[-1])
    ratio = peaks["kitout"] / peaks["TRL tuned"]
    detail = ", ".join(f"{which} {size / 2**20:,.0f} MiB" for which, size in peaks.items())
    metric = f"{name}: peak memory above the loaded model, against TRL tuned"
    return [Line(metric, f"{ratio:.2f} x", "<= 0.3 x", ratio <= 0.3, detail)]


def curves(steps: int = 5) -> list[Line]:
    """The losses of both from the same values, over the same batches in the same order, in float32."""
    examples = items("tweets", BATCH * steps)
    trainer, theirs = peer(examples, None, train_sampling_strategy="sequential", weight_decay=0.0)
    kit = build_kit(["a"], examples, torch.float32)
    same_values(trainer.model, kit)
    order = [list(range(at, at + BATCH)) for at in range(0, len(examples), BATCH)]
    settings = TrainConfig(lr=1e-3, batch_size=BATCH, warmup_ratio=0.0, lr_schedule="linear", weight_decay=0.0)
    jobs = [replace(build_jobs(kit, examples, ["a"], BATCH, steps)[0], batches=order, settings=settings)]
    run_ours, ours = timed_run(kit, jobs)
    trainer.train()
    run_ours()
    difference = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    measured = f"at most {difference:.1e} apart over {steps} steps"
    detail = f"kitout {[round(v, 4) for v in ours.losses]}, TRL {[round(float(v), 4) for v in theirs.losses]}"
    return [
        Line(
            "tweets: loss curves against TRL, fp32, same start and order", measured, "agree", difference <= 1e-2, detail
        )
    ]


def main() -> None:
    """One case's memory, for `peak_memory`."""
    which, name, tuning = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    device = torch.device("cpu")
    run_it, _, _ = case(which, name, TUNINGS[int(tuning)])
    before = memory.current(device)
    memory.reset_peak(device)
    run_it()
    print(memory.peak(device) - before)


if __name__ == "__main__":
    main()
