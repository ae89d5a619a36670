"""Two tasks, one base: what compositions and sums of two adapters keep of each (docs/compose.md, from one command).

`python studies/compose.py [--seeds 0 1 2] [--parts train stage-two evaluate page] [--folder runs/compose]`. SmolLM2
learns the sentiment of tweets and yes-or-no questions on privacy policies, each as an instruction, 1,280 examples each.
Every step is kept in the folder: a killed run goes on where it stopped. It knows no way of training of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_page import write_part

import kitout
from kitout.assets.store import fetch_asset
from kitout.data.normalize import normalize_text
from kitout.evaluate.metrics.measure import Score, mean, proportion
from kitout.evaluate.significance.many import compare_pairs
from kitout.files.atomic import write_text

MODEL = "smollm2-135m"
NUM_TRAIN, NUM_TEST, NUM_STAGE_TWO = 1280, 300, 320
METHOD = {"name": "LoRA", "rank": 16, "alpha": 32, "targets": "attn.o mlp.down", "layers": "last:15"}
TRAIN, LR = {"epochs": 1, "batch_size": 16}, 1e-3
STAGE_TWO = {"mixture": {"name": "Mixture", "per": "layer"}, "fusion": {"name": "Fusion"}}  # each at its own rate
FUSED: dict[str, dict[str, Any]] = {"sum": {}, "ties": {}, "dare": {"seed": 0}}  # at weights of 1, as published
NAMES = {
    "base": "the base", "Stack": "`Stack`, as the sum", "Mix": "`Mix` at 0.5 each, as the mean",
    "ties": "`combine(how='ties')`", "dare": "`combine(how='dare')`", "mixture": "`Mixture`, a weight per layer",
    "fusion": "`Fusion`", "both": "`both`: one LoRA on both sets",
}  # fmt: skip
CORRECT = "correct.json"
PAGE, RESULTS = Path("docs/compose.md"), Path("docs/results/compose.csv")
TASKS = {
    "tweets": "Classify the sentiment of this tweet as negative, neutral or positive.",
    "privacy": "Answer the question on this privacy policy with yes or no.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="*", default=["train", "stage-two", "evaluate", "page"])
    parser.add_argument("--folder", type=Path, default=Path("runs/compose"))
    options = parser.parse_args()
    data = write_data(options.folder / "data")
    for seed in options.seeds:
        folder = options.folder / f"seed-{seed}"
        if "train" in options.parts:
            for name, files in ({task: [data[task]] for task in TASKS} | {"both": list(data.values())}).items():
                train(folder / name, files, "train", seed, METHOD, {"lr": LR})
        if "stage-two" in options.parts:
            for name, method in STAGE_TWO.items():
                parts = {task: str(folder / task / "adapter") for task in TASKS}
                train(folder / name, list(data.values()), "stage-two", seed, {**method, "of": list(TASKS)}, {}, parts)
        if "evaluate" in options.parts:
            evaluate(folder, data)
    if "page" in options.parts:
        write_page([options.folder / f"seed-{seed}" for seed in options.seeds])


def write_data(folder: Path) -> dict[str, dict[str, Path]]:
    """Train, stage-two (a part of train) and test files of each task. No tweet and no clause is in train and test."""
    files = {
        task: {split: folder / f"{task}-{split}.jsonl" for split in ("train", "stage-two", "test")} for task in TASKS
    }
    for task, instruction in TASKS.items():
        if all(file.is_file() for file in files[task].values()):
            continue
        source = next(path for path in fetch_asset(task).glob("*.jsonl"))
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        groups: dict[str, dict[str, dict[str, str]]] = {}
        for row in rows:
            text, answer = (row["text"], row["label"]) if task == "tweets" else (row["prompt"], row["response"])
            group = text if task == "tweets" else text.rsplit("\n", 1)[0]
            example = {"system": instruction, "prompt": text, "response": answer}
            groups.setdefault(normalize_text(group, words_only=True), {}).setdefault(text, example)
        shuffled = [list(group.values()) for _, group in sorted(groups.items())]
        random.Random(0).shuffle(shuffled)
        parts = {"test": take(shuffled, NUM_TEST), "train": take(shuffled, NUM_TRAIN)}
        parts["stage-two"] = parts["train"][:NUM_STAGE_TWO]
        for split, examples in parts.items():
            files[task][split].parent.mkdir(parents=True, exist_ok=True)
            write_text(files[task][split], "".join(f"{json.dumps(example)}\n" for example in examples))
    return files


def take(groups: list[list[dict[str, str]]], num: int) -> list[dict[str, str]]:
    """The first examples of the groups, which are taken off: what is left of a group goes nowhere else."""
    taken: list[dict[str, str]] = []
    while len(taken) < num:
        taken += groups.pop(0)
    taken = taken[:num]
    random.Random(1).shuffle(taken)
    return taken


def train(
    folder: Path, sets: Sequence[Mapping[str, Path]], split: str, seed: int, method: Mapping[str, Any],
    settings: Mapping[str, Any], parts: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """One run, or what it has left of an earlier start. parts: the frozen adapters of a composition."""
    sources = [{"path": str(files[split]), "format": "instruction"} for files in sets]
    kitout.train(
        model={"name": MODEL, "adapters": parts or {}},
        method=method,
        data={"train": sources, "validation": 0, "test": 0},
        train={**TRAIN, **settings, "seed": seed},
        output={"folder": str(folder), "name": folder.name},
    )


def evaluate(folder: Path, data: Mapping[str, Mapping[str, Path]]) -> None:
    """Which test examples each way gets right, of one seed, into correct.json."""
    file = folder / CORRECT
    if file.is_file():
        return
    names = [*TASKS, "both", *STAGE_TWO]
    predictor = kitout.load(*(folder / name / "adapter" for name in names))
    kit, one = predictor.kit, dict.fromkeys(TASKS, 1.0)
    for how, options in FUSED.items():
        kitout.combine(kit, how, one, how=how, **options)
    routes = {
        **{task: task for task in TASKS},
        "Stack": kitout.Stack(*TASKS),
        "Mix": kitout.Mix(dict.fromkeys(TASKS, 0.5)),
        **{how: how for how in FUSED if how != "sum"},
        **{name: name for name in (*STAGE_TWO, "both")},
    }
    rows = [json.loads(line) for line in data["tweets"]["test"].read_text(encoding="utf-8").splitlines()[:8]]
    apart = logits_apart(predictor, [row["prompt"] for row in rows], routes["Stack"], "sum")
    sources = [{"path": str(files["test"]), "format": "instruction"} for files in data.values()]
    found = kitout.assess.run(kit, routes, sources, tokenizer=predictor.tokenizer, log=print)
    correct = {
        task: {name: measures["accuracy"].correct.astype(int).tolist() for name, measures in one.measures.items()}
        for task, one in zip(TASKS, found.sets, strict=True)
    }
    parameters = {name: sum(p.numel() for p in kit[name].parameters()) for name in names}
    write_text(file, json.dumps({"correct": correct, "parameters": parameters, "sum and Stack apart": apart}))


@torch.no_grad()
def logits_apart(predictor: Any, prompts: Sequence[str], first: object, second: object) -> float:
    """The largest difference of logits under two routes."""
    batch = predictor.tokenizer(list(prompts), return_tensors="pt", padding=True)
    logits = []
    for route in (first, second):
        with predictor.kit.use(route):
            logits.append(predictor.kit(**batch).logits)
    return float((logits[0] - logits[1]).abs().max())


def percent(score: Score) -> str:
    """62.0 (56.9 to 66.8)"""
    return f"{100 * score.value:.1f} ({100 * score.low:.1f} to {100 * score.high:.1f})"


def write_page(folders: Sequence[Path]) -> None:
    """docs/compose.md between its two marks, and docs/results/compose.csv, from what every seed has found."""
    found = [json.loads((folder / CORRECT).read_text(encoding="utf-8")) for folder in folders]
    cells = [["seed", "adapters", "task", "correct", "examples"]]
    lines = [
        "| what runs | trained | tweets | against `both` | privacy | against `both` |",
        "|---|--:|--:|---|--:|---|",
    ]
    differences: dict[tuple[str, str], str] = {}
    for task in TASKS:
        scores = {name: [one["correct"][task][name] for one in found] for name in found[0]["correct"][task]}
        cells += [
            [folder.name.removeprefix("seed-"), name, task, sum(rows[k]), len(rows[k])]
            for name, rows in scores.items()
            for k, folder in enumerate(folders)
        ]
        for one in compare_pairs(scores, default="both"):
            low, high = (f"{100 * end:+.1f}" for end in (one.low, one.high))
            word = {True: "better", False: "worse", None: ""}[one.is_better]
            differences[task, one.name] = f"{100 * one.difference:+.1f} ({low} to {high}) {word}".strip()
    for name in scores:
        row = [
            NAMES.get(name, f"`{name}` alone"),
            f"{found[0]['parameters'][name]:,}" if name in found[0]["parameters"] else "",
        ]
        for task in TASKS:
            score = mean(np.mean([one["correct"][task][name] for one in found], axis=0)).score()
            row += [percent(score), differences.get((task, name), "")]
        lines.append(f"| {' | '.join(row)} |")
    constant = ["always the most frequent answer", ""]
    for task in TASKS:
        file = folders[0].parent / "data" / f"{task}-test.jsonl"
        answers = [json.loads(line)["response"] for line in file.read_text(encoding="utf-8").splitlines()]
        most = max(set(answers), key=answers.count)
        constant += [percent(proportion(np.array([answer == most for answer in answers])).score()), ""]
    lines.append(f"| {' | '.join(constant)} |")
    apart = max(one["sum and Stack apart"] for one in found)
    lines += ["", f"The sum of both (`combine(how='sum')`) is the Stack: logits at most {apart:.0e} apart."]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(cells)
    write_part(PAGE, "compose", [*lines, ""])


if __name__ == "__main__":
    main()
