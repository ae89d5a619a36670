"""Learning rates of the methods on text, chosen on a validation split of the demo's tweets, never on its test split.

The demo's test tweets are removed first. Each method is trained on the same few hundred of the others at rates a factor
of three apart. While the best one is the highest or the lowest tried, one more is tried beyond it. The metric is the
cross-entropy of the right label among the labels (less noisy than the accuracy beside it). Finished trials are kept in
runs/ line by line, and an unfinished one in a checkpoint: a search that was stopped resumes.

    python benchmarks/text_search.py [--methods lora prompt] [--rates 1e-3 3e-3] [--seeds 0 1] [--train 480] [--write]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import logging

import kitout
from kitout import (
    IA3,
    MAM,
    SSF,
    AdaptFormer,
    BitFit,
    FullFineTuning,
    Houlsby,
    Kit,
    LoRA,
    Method,
    ParallelAdapter,
    PartialFineTuning,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
)
from kitout.assets import store
from kitout.data.encode.item import EncodedExample
from kitout.demo.text import INSTRUCTION, MODEL, TextDemo, preset
from kitout.errors import TrainingDiverged
from kitout.evaluate.ask.label_likelihood import label_likelihoods
from kitout.methods.deltas.trained_copy import TrainedCopy
from kitout.train import checkpoints
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.batch_plan import plan_batches
from kitout.train.loop.jobs import Job
from kitout.train.loop.trainer import JobTrainer
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.setup import device
from kitout.train.setup.closed_answers import ClosedAnswers, prompt_ids
from kitout.train.setup.datasets import load_text_datasets

HERE = Path(__file__).parent
Make = Callable[[tuple[int, ...]], Method]  # from the tokens of the instruction


@dataclass(frozen=True)
class Row:
    """One method of the search."""

    title: str
    start: float
    """The learning rate in the middle of those tried first."""
    make: Make


def words(number: int) -> tuple[int, ...]:
    """Rows of the vocabulary's first 5,000, drawn once."""
    return tuple(torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:number].tolist())


ROWS: dict[str, Row] = {
    "prompt": Row("PromptTuning, 20 of the vocabulary", 3e-2, lambda _: PromptTuning(length=20)),
    "lora": Row("LoRA, rank 8, all linear", 1e-3, lambda _: LoRA(rank=8, targets="all-linear")),
    "prefix": Row("PrefixTuning, 16", 1e-2, lambda _: PrefixTuning(length=16)),
    "ia3": Row("IA3", 1e-2, lambda _: IA3()),
    "bitfit": Row("BitFit", 3e-3, lambda _: BitFit()),
    "ssf": Row("SSF", 3e-3, lambda _: SSF()),
    "houlsby": Row("Houlsby, 64", 1e-3, lambda _: Houlsby()),
    "pfeiffer": Row("Pfeiffer, 48", 1e-3, lambda _: Pfeiffer()),
    "pfeiffer-wide": Row("Pfeiffer, 48, std 0.02", 1e-3, lambda _: Pfeiffer(std=0.02)),
    "ssf-narrow": Row("SSF, std 0.002", 3e-3, lambda _: SSF(std=0.002)),
    "prefix-encoder": Row("PrefixTuning, 16, encoder 512", 1e-3, lambda _: PrefixTuning(length=16, encoder=512)),
    "parallel": Row("ParallelAdapter, 512", 3e-5, lambda _: ParallelAdapter()),
    "mam": Row("MAM, 30 and 512", 3e-5, lambda _: MAM()),
    "adaptformer": Row("AdaptFormer, 64", 3e-3, lambda _: AdaptFormer()),
    "lora-qv": Row("LoRA, rank 8, q and v", 1e-3, lambda _: LoRA(rank=8)),
    "full": Row("FullFineTuning", 3e-5, lambda _: FullFineTuning()),
    "partial": Row("PartialFineTuning, last block", 3e-4, lambda _: PartialFineTuning(last=1)),
    "prompt-text": Row("PromptTuning, 20 of the instruction", 3e-2, lambda ids: PromptTuning(length=20, init=ids)),
    "prompt-normal": Row("PromptTuning, 20 at random", 3e-2, lambda _: PromptTuning(length=20, init="normal")),
    "prefix-text": Row("PrefixTuning, 12 of the instruction", 1e-2, lambda ids: PrefixTuning(length=12, init=ids)),
    "prefix-vocab": Row("PrefixTuning, 16 of the vocabulary", 1e-2, lambda _: PrefixTuning(init=words(16))),
}


@dataclass(frozen=True)
class Budget:
    """The size of one trial; trials of another budget are not compared."""

    train: int = 480
    validation: int = 300
    batch: int = 8
    dtype: str = "bf16"

    @property
    def steps(self) -> int:
        return math.ceil(self.train / self.batch)


@dataclass
class Bench:
    """The frozen model and the tweets, for one method after the other."""

    kit: Kit
    tokenizer: Any
    answers: ClosedAnswers
    train: list[EncodedExample]
    held_out: list[EncodedExample]
    budget: Budget
    out: Path

    def run(self, key: str, rate: float, seed: int) -> dict[str, object]:
        """One trial, from its checkpoint if there is one."""
        kit = self.kit
        instruction = tuple(self.tokenizer(INSTRUCTION, add_special_tokens=False).input_ids)
        adapter = kit.add("trial", ROWS[key].make(instruction), seed=seed)
        is_large = any(isinstance(delta, TrainedCopy) for delta in adapter.deltas.values())  # gigabytes: no checkpoints
        folder = self.out / "checkpoints" / key
        torch.manual_seed(seed)
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            trainer = self._trainer(folder, json.dumps([key, rate, seed, asdict(self.budget)]), rate, seed, is_large)
            last = next(reversed(checkpoints.list_checkpoints(folder)), None)
            if last is not None and checkpoints.read_progress(last)["run"] != trainer.run_id:  # of another trial
                shutil.rmtree(folder)
                last = None
            trainer.train(str(last) if last else None)
            with kit.use("trial"):
                accuracy, loss = self.measure()
            losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
            final_loss = sum(losses[-10:]) / 10
        except TrainingDiverged:
            accuracy, loss, final_loss = 0.0, math.inf, math.inf
        finally:
            kit.remove("trial")
            kit.eval()
        shutil.rmtree(folder, ignore_errors=True)
        seconds, processor = time.perf_counter() - start, time.process_time() - cpu_start
        return {
            "key": key, "rate": rate, "seed": seed, "budget": asdict(self.budget), "accuracy": accuracy, "loss": loss,
            "train_loss": final_loss, "seconds": round(seconds, 1), "processor_seconds": round(processor, 1),
        }  # fmt: skip

    def _trainer(self, folder: Path, run: str, rate: float, seed: int, is_large: bool) -> JobTrainer:
        settings = TrainConfig(lr=rate, weight_decay=0.0, batch_size=self.budget.batch, seed=seed)
        steps = plan_batches([len(item.input_ids) for item in self.train], settings.batch_size, self.budget.steps, seed)
        objective = CausalLM(self.kit)
        with self.kit.use("trial"):
            objective.choose_head_loss(["trial"], [self.train[i] for i in steps[0]])
        args = TrainingArguments(
            output_dir=str(folder), max_steps=len(steps), per_device_train_batch_size=1, report_to="none",
            logging_steps=1, logging_nan_inf_filter=False, disable_tqdm=True, remove_unused_columns=False,
            use_cpu=self.kit.device.type == "cpu", save_strategy="no" if is_large else "steps", save_steps=20,
        )  # fmt: skip
        return JobTrainer(
            self.kit,
            [Job("trial", objective, self.train, steps, settings)],
            folder,
            args,
            run_id=run,
            num_checkpoints=1,
        )

    def measure(self) -> tuple[float, float]:
        """Accuracy and cross-entropy of the right label among the labels, of what is active in the kit."""
        prompts = [prompt_ids(item) for item in self.held_out]
        scores = (
            label_likelihoods(self.kit, prompts, self.answers.token_ids, self.answers.end_token_id)
            .cpu()
            .log_softmax(dim=1)
        )
        targets = torch.tensor([self.answers.names.index(item.reference) for item in self.held_out])
        loss = torch.nn.functional.nll_loss(scores, targets).item()
        accuracy = (scores.argmax(dim=1) == targets).float().mean().item()
        return accuracy, loss if math.isfinite(loss) else math.inf


def build_bench(budget: Budget, out: Path) -> Bench:
    """The demo's model and tweets, without its test tweets."""
    folder = store.fetch_asset(MODEL, print)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype, _ = device.choose_dtype(budget.dtype, device.default_device())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device.default_device())
    kit = kitout.attach(model)
    model.set_attn_implementation("eager")  # short texts: as `kitout train` chooses on a CPU
    demo = preset(TextDemo()).data
    test_ids = {item.input_ids for item in load_text_datasets(demo, "causal_lm", tokenizer, False).test}
    num_examples = budget.train + budget.validation
    source = demo.train[0].model_copy(
        update={"limit": num_examples + num_examples // 4}
    )  # some are test ones or duplicates
    search_data = demo.model_copy(update={"train": (source,), "test": 0, "seed": demo.seed + 1})
    datasets = load_text_datasets(search_data, "causal_lm", tokenizer, False)
    others = [item for item in datasets.train if item.input_ids not in test_ids]
    random.Random(0).shuffle(others)
    held_out, train = others[: budget.validation], others[budget.validation : num_examples]
    assert datasets.answers is not None
    return Bench(kit, tokenizer, datasets.answers, train, held_out, budget, out)


class Results:
    """Finished trials, one line of JSON each; a line that a kill cut short is ignored."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    def all(self) -> list[dict]:
        trials = []
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            try:
                trials.append(json.loads(line))
            except ValueError:
                continue
        return trials

    def add(self, trial: dict) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(trial) + "\n")

    def get(self, budget: Budget, key: str, rate: float, seed: int) -> dict | None:
        return next((t for t in self.of(budget, key) if (t["rate"], t["seed"]) == (rate, seed)), None)

    def of(self, budget: Budget, key: str) -> list[dict]:
        """One trial per rate and seed."""
        same = [t for t in self.all() if t["key"] == key and t["budget"] == asdict(budget)]
        return list({(t["rate"], t["seed"]): t for t in same}.values())

    def rates(self, budget: Budget, key: str) -> dict[float, tuple[float, float, int]]:
        """By rate: mean cross-entropy and accuracy, and over how many seeds."""
        by_rate: dict[float, list[dict]] = {}
        for trial in self.of(budget, key):
            by_rate.setdefault(trial["rate"], []).append(trial)
        return {rate: (_mean(t, "loss"), _mean(t, "accuracy"), len(t)) for rate, t in sorted(by_rate.items())}

    def budgets(self) -> list[Budget]:
        return sorted({Budget(**t["budget"]) for t in self.all()}, key=lambda b: b.train)


def _mean(trials: Sequence[dict], what: str) -> float:
    return sum(t[what] for t in trials) / len(trials)


def step(rate: float, up: bool) -> float:
    """The next rate of 1, 3, 10, 30, ... times a power of ten."""
    power = math.floor(math.log10(rate) + 1e-9)
    ones = rate / 10**power < 2
    power += (0 if ones else 1) if up else (-1 if ones else 0)
    return float(f"{3 if ones else 1}e{power}")


def search(bench: Bench, results: Results, key: str, rates: Sequence[float], seeds: Sequence[int]) -> None:
    """Every rate with every seed; with none given, three around the row's start and then beyond an edge that won."""
    start = ROWS[key].start
    todo = list(rates) or [start, step(start, False), step(start, True)]
    tried_now: set[float] = set()
    while todo:
        rate = todo.pop(0)
        tried_now.add(rate)
        for seed in seeds:
            trial = results.get(bench.budget, key, rate, seed)
            if trial is None:
                trial = bench.run(key, rate, seed)
                results.add(trial)
            print(
                f"{key} {rate:.0e} seed {seed}: cross-entropy {trial['loss']:.3f}, {100 * trial['accuracy']:.1f} %, "
                f"training loss at the end {trial['train_loss']:.3f}, {trial['processor_seconds']:.0f} s",
                flush=True,
            )
        if not todo and not rates:
            tried = {r: values[0] for r, values in results.rates(bench.budget, key).items() if r in tried_now}
            best = min(tried, key=tried.__getitem__)
            if best in (min(tried), max(tried)) and len(tried) < 6:
                todo = [step(best, best == max(tried))]


def table(results: Results, budget: Budget) -> str:
    """One line per method, its best rate in bold."""
    lines = ["| method | best | tried: cross-entropy (accuracy %) |", "|---|--:|---|"]
    for key, row in ROWS.items():
        tried = results.rates(budget, key)
        if not tried:
            continue
        best = min(tried, key=lambda rate: tried[rate][0])
        cells = []
        for rate, (loss, accuracy, seeds) in tried.items():
            cell = f"{rate:.0e}: {loss:.3f} ({100 * accuracy:.1f})" + (f" x{seeds}" if seeds > 1 else "")
            cells.append(f"**{cell}**" if rate == best else cell)
        lines.append(f"| {row.title} | {best:.0e} | {', '.join(cells)} |")
    return "\n".join(lines)


def page(results: Results, bench: Bench) -> str:
    """Every budget there are trials of."""
    accuracy, loss = bench.measure()
    about = device.describe_machine(device.default_device())
    text = (
        f"Made by `python benchmarks/text_search.py --write`. {MODEL}, tweets as chats, one epoch; AdamW without "
        "weight decay, 6 % warmup, half cosine, clipped at 1; adapters are fp32. Measured on "
        f"{len(bench.held_out)} other tweets, none of them a test tweet of the demo: cross-entropy of the right label "
        "among the three, and accuracy. x2: mean over two seeds, else seed 0. "
        f"The base: {loss:.3f} ({100 * accuracy:.1f}); always the majority class: "
        f"{100 * _majority(bench.held_out):.1f} %. Three points of accuracy are noise."
    )
    sections = ["# Learning rates on text", text]
    for budget in results.budgets():
        sections.append(f"## {budget.train} tweets, batch {budget.batch}: {budget.steps} steps, {budget.dtype} base")
        sections.append(table(results, budget))
    sections.append(f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}.")
    return "\n\n".join(sections) + "\n"


def _majority(items: Sequence[EncodedExample]) -> float:
    labels = [item.reference for item in items]
    return max(map(labels.count, set(labels))) / len(labels)


def main() -> None:
    """Every requested method at its rates, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", choices=[[], *ROWS], default=[], help="default: all")
    parser.add_argument("--rates", nargs="*", type=float, default=[], help="default: around each method's start")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--train", type=int, default=Budget.train, help="tweets to train on")
    parser.add_argument("--batch", type=int, default=Budget.batch)
    parser.add_argument("--out", type=Path, default=Path("runs/text-search"))
    parser.add_argument("--write", action="store_true", help="keep the tables in TEXT_SEARCH.md")
    parser.add_argument("--only-write", action="store_true", help="the tables of what is there, no trials")
    options = parser.parse_args()
    results = Results(options.out / "trials.jsonl")
    bench = build_bench(Budget(options.train, batch=options.batch), options.out)
    for key in () if options.only_write else options.methods or ROWS:
        search(bench, results, key, options.rates, options.seeds)
    text = page(results, bench)
    print(text)
    if options.write or options.only_write:
        (HERE / "TEXT_SEARCH.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
