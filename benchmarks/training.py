"""(g) `kitout train`'s loop against TRL's SFTTrainer with PEFT, and eight jobs at once against one after the other.

SmolLM2-135M with its real weights, LoRA r=8 on every linear, batch 16, tweets in instruction form and BoolQ, the same
trained tokens for all. Speed is real (unpadded) tokens a second over whole epochs of a few steps, in turn. Memory is
the peak above the loaded model, each case in a process of its own. Needs the assets of `make demo`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Line, Times
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

BATCH = 16
TWEETS = "Classify the sentiment of this tweet as negative, neutral or positive."
SETS = {"tweets": ("tweets", TWEETS), "boolq": ("boolq", None)}
STEPS = {"tweets": 4, "boolq": 2}
MAX_LENGTH = 256
Case = Callable[[], float]


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


def base(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype)


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


def trl(examples: list[EncodedExample], tuned: bool) -> tuple[Case, Clock]:
    trainer, clock = peer(examples, tuned)

    def run() -> float:
        trainer.train()
        return clock.seconds

    return run, clock


def peer(examples: list[EncodedExample], tuned: bool, **more: Any) -> tuple[Any, Clock]:
    """TRL's trainer over these examples."""
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
    if tuned:
        settings |= {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-3,
        completion_only_loss=True, max_length=MAX_LENGTH, bf16=False, use_cpu=True, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    clock = Clock()
    trainer = SFTTrainer(
        model=base(torch.bfloat16 if tuned else torch.float32), args=args, train_dataset=rows, callbacks=[clock],
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


def build_kit(names: list[str], dtype: torch.dtype = torch.bfloat16, eager: bool = True) -> kitout.Kit:
    kit = kitout.attach(base(dtype))
    if eager:
        kit.base.set_attn_implementation("eager")  # as `kitout train` chooses below 256 tokens on a CPU
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


def case(which: str, name: str) -> tuple[Case, Clock, int]:
    examples = items(name, BATCH * STEPS[name])
    tokens = sum(len(i.input_ids) for i in examples)
    if which != "kitout":
        return (*trl(examples, which == "TRL tuned"), tokens)
    kit = build_kit(["a"])
    return (*timed_run(kit, build_jobs(kit, examples, ["a"], BATCH, STEPS[name])), tokens)


def run(rounds: int = 3) -> list[Line]:
    lines = []
    for name in SETS:
        lines += speed(name, rounds) + peak_memory(name)
    return lines + curves() + at_once(rounds)


def speed(name: str, rounds: int) -> list[Line]:
    cases = {which: case(which, name) for which in CASES}
    clocked = in_turn({which: one[0] for which, one in cases.items()}, rounds)
    tokens = cases["kitout"][2]
    detail = ", ".join(f"{which} {tokens / clocked.best(which):.0f} tokens/s" for which in CASES)
    curves = "; ".join(f"{which} {[round(v, 2) for v in one[1].losses]}" for which, one in cases.items())
    lines = []
    for to, minimum in (("TRL defaults", 3.5), ("TRL tuned", 1.8)):
        ratio = clocked.ratio(to, "kitout")
        measured = f"{ratio:.2f} x (median of rounds {clocked.paired(to, 'kitout'):.2f})"
        lines.append(Line(f"{name}: tokens/s against {to}", measured, f">= {minimum} x", ratio >= minimum, detail))
        detail = f"losses of the last round: {curves}"
    return lines


def peak_memory(name: str) -> list[Line]:
    """Peak memory above the loaded model, each in its own process."""
    peaks = {}
    for which in ("kitout", "TRL tuned"):
        command = [sys.executable, __file__, which, name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[which] = json.loads(out.strip().splitlines()[-1])
    ratio = peaks["kitout"] / peaks["TRL tuned"]
    detail = ", ".join(f"{which} {size / 2**20:,.0f} MiB" for which, size in peaks.items())
    metric = f"{name}: peak memory above the loaded model, against TRL tuned"
    return [Line(metric, f"{ratio:.2f} x", "<= 0.4 x", ratio <= 0.4, detail)]


def curves(steps: int = 5) -> list[Line]:
    """The losses of both from the same values, over the same batches in the same order, in float32."""
    examples = items("tweets", BATCH * steps)
    trainer, theirs = peer(examples, False, train_sampling_strategy="sequential", weight_decay=0.0)
    kit = build_kit(["a"], torch.float32, eager=False)
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


def at_once(rounds: int) -> list[Line]:
    """Eight LoRA jobs of two examples a step: together, and one after the other."""
    names = [f"job{k}" for k in range(8)]
    examples = items("tweets", 8 * 2 * 8)
    kit = build_kit(names)
    jobs = build_jobs(kit, examples, names, 2, 8)
    joint, _ = timed_run(kit, jobs)
    each = [timed_run(kit, [job])[0] for job in jobs]
    times = in_turn({"at once": joint, "in turn": lambda: sum(one() for one in each)}, rounds)
    ratio = times.ratio("in turn", "at once")
    measured = f"{ratio:.2f} x (median of rounds {times.paired('in turn', 'at once'):.2f})"
    return [Line("8 LoRA jobs at once, throughput against one after the other", measured, ">= 1.5 x", ratio >= 1.5)]


def main() -> None:
    """One case's memory, for `peak_memory`."""
    which, name = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    device = torch.device("cpu")
    run_it, _, _ = case(which, name)
    before = memory.current(device)
    memory.reset_peak(device)
    run_it()
    print(memory.peak(device) - before)


if __name__ == "__main__":
    main()
