"""Two tasks, one base: what compositions and sums of two adapters keep of each (docs/compose.md, from one command).

`python studies/compose.py [--seeds 0 1 2] [--parts train stage-two evaluate page] [--folder runs/compose]`. SmolLM2
learns the sentiment of tweets and yes-or-no questions on privacy policies, each as an instruction, 1,280 examples each.
Every step is kept in the folder: a killed run goes on where it stopped. It knows kitout by its public names alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kitout
from kitout.assets.store import fetch_asset
from kitout.data.normalize import normalize_text
from kitout.files.atomic import write_text

MODEL = "smollm2-135m"
NUM_TRAIN, NUM_TEST, NUM_STAGE_TWO = 1280, 300, 320
METHOD = {"name": "LoRA", "rank": 16, "alpha": 32, "targets": "attn.o mlp.down", "layers": "last:15"}
TRAIN = {"epochs": 1, "batch_size": 16, "lr": 1e-3}
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
                train(folder / name, files, "train", seed, METHOD)


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


def train(folder: Path, sets: Sequence[Mapping[str, Path]], split: str, seed: int, method: Mapping[str, Any]) -> None:
    """One run, or what it has left of an earlier start."""
    sources = [{"path": str(files[split]), "format": "instruction"} for files in sets]
    kitout.train(
        model=MODEL,
        method=method,
        data={"train": sources, "validation": 0, "test": 0},
        train=TRAIN | {"seed": seed},
        output={"folder": str(folder), "name": folder.name},
    )


if __name__ == "__main__":
    main()
