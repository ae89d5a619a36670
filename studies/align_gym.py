"""Does reinforcement raise the reward of held-out prompts? Sums with SmolLM2, several seeds (docs/results/align.md).

`python studies/align_gym.py [--tasks ...] [--folder runs/align-gym]`. For each task one short sft on
right answers, then one grpo from it for each seed, all measured on the same held-out prompts. Every stage is a run of
`kitout align`: a killed study goes on where it stopped, and the page marks what was not run. It trains and measures
nothing by itself.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from result_page import write_part

import kitout
from kitout.evaluate.example_scores import load_scores
from kitout.evaluate.intervals.distributions import t_quantile
from kitout.evaluate.significance.seeds import MIN_SEEDS, compare_methods
from kitout.evaluate.significance.two_errors import half_width
from kitout.train.metrics_log import read_metrics

MODEL = "smollm2-135m"


@dataclass(frozen=True)
class GymTask:
    """Sums of reasoning-gym, and how they are trained on."""

    gym: str
    """The name in a run."""
    steps: int
    """Of grpo."""
    lr: float
    """Of grpo, constant."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of grpo."""
    sft_steps: int = 60
    """Before it, of 8 right answers each."""

    @property
    def data(self) -> dict[str, Any]:
        """The run's."""
        source = {"path": self.gym, "system_prompt": "Answer with a number.", "limit": 2000}
        return {"train": [source], "validation": 0, "test": 300, "seed": 0}


TASKS = {
    "one or two digits, 48 answers first": GymTask(
        "gym:chain_sum:min_terms=2:max_terms=2:min_digits=1:max_digits=2", 60, 3e-4, sft_steps=6
    ),
    "one or two digits": GymTask(
        "gym:chain_sum:min_terms=2:max_terms=2:min_digits=1:max_digits=2", 100, 2e-4, (0, 1, 2, 3, 4)
    ),
    "two digits": GymTask("gym:chain_sum:max_terms=2:min_digits=2:max_digits=2", 200, 3e-4),
}
MAX_NEW_TOKENS = 8
SFT = {"batch_size": 8, "seed": 0}
ROLLOUT = {"prompts": 4, "samples": 8, "max_new_tokens": MAX_NEW_TOKENS}
NUM_TEST = 200  # of the held-out prompts
METRICS = {"reward": "reward, held-out prompts", "exact_match": "right, held-out prompts"}
SAMPLED = "reward, sampled answers"
PAGE, CELLS = Path("docs/results/align.md"), Path("docs/results/align-gym.csv")
HEAD = ["task", "metric", "seed", "examples", "before", "after"]  # of the cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--folder", type=Path, default=Path("runs/align-gym"))
    parser.add_argument("--page", action="store_true", help="write the page from what is finished, and run nothing")
    options = parser.parse_args()
    for name in () if options.page else options.tasks:
        task, folder = TASKS[name], task_folder(options.folder, name)
        train_sft(task, folder / "sft")
        for seed in task.seeds:
            train_grpo(task, run_folder(folder, seed), folder / "sft/adapter", seed)
    write_page(options.folder)


def task_folder(folder: Path, name: str) -> Path:
    """Of one task."""
    return folder / name.replace(",", "").replace(" ", "-")


def run_folder(folder: Path, seed: int) -> Path:
    """Of one grpo of a task."""
    return folder / f"grpo-{seed}"


def train_sft(task: GymTask, folder: Path) -> None:
    """What all seeds start from: it ends its answers, and some are right. It is measured by the grpo stages."""
    kitout.align(
        stage="sft", model=MODEL, data=task.data, train={**SFT, "steps": task.sft_steps}, output=str(folder),
        evaluate={"max_test_examples": 20, "generate_examples": 4, "max_new_tokens": MAX_NEW_TOKENS},
    )  # fmt: skip


def train_grpo(task: GymTask, folder: Path, start: Path, seed: int) -> None:
    """One seed of the order of prompts and of what is sampled; data and held-out prompts are those of all seeds."""
    train = {"lr": task.lr, "lr_schedule": "constant", "steps": task.steps, "seed": seed}
    kitout.align(
        stage="grpo", model=MODEL, data=task.data, from_=str(start), reward=task.gym, rollout=ROLLOUT, train=train,
        evaluate={"max_test_examples": NUM_TEST}, output=str(folder),
    )  # fmt: skip


def write_page(folder: Path) -> None:
    """The tasks that have finished seeds, each in its part of the page, and their cells in the CSV."""
    cells = read_cells()
    for task, settings in TASKS.items():
        runs = {seed: run_folder(task_folder(folder, task), seed) for seed in settings.seeds}
        finished = {seed: run for seed, run in runs.items() if (run / "results.json").is_file()}
        if not finished:
            continue
        lines, cells[task] = task_rows(task, finished)
        if missing := [str(seed) for seed in runs if seed not in finished]:
            lines += ["", f"Not run: seeds {', '.join(missing)}."]
        write_part(PAGE, task, [*lines, "", what_ran(settings), ""])
    CELLS.parent.mkdir(parents=True, exist_ok=True)
    with CELLS.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEAD, *(row for task in TASKS for row in cells.get(task, ()))])


def read_cells() -> dict[str, list[list[Any]]]:
    """Those of earlier runs, by task."""
    if not CELLS.is_file():
        return {}
    with CELLS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {task: [row for row in rows if row[0] == task] for task in TASKS}


def task_rows(task: str, finished: Mapping[int, Path]) -> tuple[list[str], list[list[Any]]]:
    """The table of one task, and its cells."""
    lines, cells = ["| metric | seed | before | after | rise, 95 % interval |", "|---|---|--:|--:|---|"], []
    scores = {seed: load_scores(run / "scores.safetensors")["grpo"] for seed, run in finished.items()}
    for metric, title in METRICS.items():
        pairs = {
            seed: (one.base[metric].ratio.numerators, one.tuned[metric].ratio.numerators)
            for seed, one in scores.items()
        }
        for seed, (before, after) in pairs.items():
            lines.append(row(title, str(seed), *over_prompts(before, after)))
            cells.append([task, metric, seed, len(before), f"{before.mean():.6f}", f"{after.mean():.6f}"])
        if len(pairs) >= MIN_SEEDS:
            lines.append(row(title, "all", *over_both(*map(np.stack, zip(*pairs.values(), strict=True)))))
    thirds = {seed: first_and_last_third(run) for seed, run in finished.items()}
    for seed, (first, last) in thirds.items():
        lines.append(row(SAMPLED, str(seed), first, last, last - first))
        cells.append([task, "sampled_reward", seed, "", f"{first:.6f}", f"{last:.6f}"])
    if len(thirds) >= MIN_SEEDS:
        lines.append(row(SAMPLED, "all", *over_seeds(np.array(list(thirds.values())))))
    return lines, cells


def first_and_last_third(run: Path) -> tuple[float, float]:
    """Mean reward of the answers that were sampled in the first and in the last third of the steps."""
    rewards = [line["reward"] for line in read_metrics(run / "metrics.jsonl") if "reward" in line]
    part = len(rewards) // 3
    return float(np.mean(rewards[:part])), float(np.mean(rewards[-part:]))


def over_prompts(before: Any, after: Any) -> tuple[float, ...]:
    """Before, after, rise and its interval over the prompts, of one seed."""
    one = compare_methods(after, before, names=("grpo", "sft"), share=False)
    return before.mean(), after.mean(), one.difference, one.low, one.high


def over_both(before: Any, after: Any) -> tuple[float, ...]:
    """The same of all seeds [seeds, prompts], over both: half-widths of seeds and of prompts, added as squares.

    All seeds have one start, so Student's t has the degrees of freedom of grpo's seeds alone.
    """
    one = compare_methods(after, before, names=("grpo", "sft"), share=False)
    half = half_width(0.975, [(one.seed_error or 0.0, len(after) - 1), (one.example_error, after.shape[1] - 1)])
    return before.mean(), after.mean(), one.difference, one.difference - half, one.difference + half


def over_seeds(values: Any) -> tuple[float, ...]:
    """Of [seeds, 2]: before, after, rise and Student's interval over the seeds, each with its own order and draws."""
    rises = values[:, 1] - values[:, 0]
    half = t_quantile(0.975, len(rises) - 1) * rises.std(ddof=1) / math.sqrt(len(rises))
    return *values.mean(axis=0), rises.mean(), rises.mean() - half, rises.mean() + half


def row(title: str, seed: str, before: float, after: float, rise: float, *ends: float) -> str:
    """A line of the table, in hundredths."""
    interval = f" ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})" if ends else ""
    return f"| {title} | {seed} | {100 * before:.1f} | {100 * after:.1f} | {100 * rise:+.1f}{interval} |"


def what_ran(task: GymTask) -> str:
    """The settings in a sentence."""
    sft = f"sft {task.sft_steps} steps of {SFT['batch_size']} right answers"
    grpo = f"grpo {task.steps} steps of {ROLLOUT['prompts']} prompts x {ROLLOUT['samples']} answers"
    return (
        f"{MODEL}, LoRA at its defaults, `{task.gym}`; {sft}; {grpo} at a constant {task.lr:g}; {NUM_TEST} held-out "
        "prompts, answered greedily."
    )


if __name__ == "__main__":
    main()
