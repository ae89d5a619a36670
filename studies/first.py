"""Every method on three tasks, three seeds: quality, forgetting and cost (docs/results/first.md, from one command).

`python studies/first.py [--parts minilm dinov2 smollm2] [--methods LoRA ...] [--folder runs/first]`. A part is a model
with its task, each method one run of `kitout train` with `train.seeds`, at kitout's own learning rates; what is
finished is not run again, and the page marks what was not run. It trains nothing by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetting_table import forgetting_lines

import kitout
from kitout.compare import compare_runs, write_csv
from kitout.files.atomic import write_text

SEEDS = [0, 1, 2]
INSTRUCTION = "Classify the sentiment of this tweet as negative, neutral or positive."
PARTS: dict[str, dict[str, Any]] = {
    "minilm": {
        "title": "Sentiment of tweets, MiniLM (22 M, an encoder), 1,280 examples",
        "model": "minilm",
        "data": {"train": {"path": "tweets", "limit": 1880}, "validation": 0, "test": 600},
    },
    "dinov2": {
        "title": "Digits, DINOv2-small (22 M, images of 56 pixels), 1,000 examples",
        "model": "dinov2-small",
        "data": {"train": {"path": "mnist-5k", "limit": 2000}, "validation": 0, "test": 1000, "image_size": 56},
    },
    "smollm2": {
        "title": "Sentiment of tweets, SmolLM2-135M-Instruct (a decoder), 300 examples as instructions",
        "model": "smollm2-135m",
        "data": {
            "train": {"path": "tweets", "format": "label", "limit": 610, "system_prompt": INSTRUCTION},
            "validation": 0,
            "test": 300,
        },
        "evaluate": {"forgetting": "quick"},
    },
}
METHODS: dict[str, Any] = {
    "LoRA": {"name": "LoRA", "targets": "all-linear"},
    "DoRA": {"name": "LoRA", "targets": "all-linear", "dora": True},
    "IA3": "IA3",
    "BitFit": "BitFit",
    "SSF": "SSF",
    "Houlsby": "Houlsby",
    "Pfeiffer": "Pfeiffer",
    "ParallelAdapter": "ParallelAdapter",
    "AdaptFormer": "AdaptFormer",
    "PromptTuning": "PromptTuning",
    "PrefixTuning": "PrefixTuning",
    "PrefixTuning+encoder": {"name": "PrefixTuning", "encoder": True},
    "VPT-shallow": {"name": "VPT", "deep": False},
    "VPT-deep": {"name": "VPT", "deep": True},
    "PartialFineTuning": {"name": "PartialFineTuning", "last": 2},
    "FullFineTuning": "FullFineTuning",
}
TEXT_ONLY, IMAGES_ONLY = ("PromptTuning", "PrefixTuning+encoder"), ("VPT-shallow", "VPT-deep")
PAGE, CELLS = Path("docs/results/first.md"), Path("docs/results")
BEGIN, END = "<!-- results: studies/first.py -->", "<!-- end of results -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("runs/first"))
    parser.add_argument("--page", action="store_true", help="write the page from what is finished, and run nothing")
    options = parser.parse_args()
    for part in () if options.page else options.parts:
        for name in options.methods:
            if name in methods_of(part):
                train(PARTS[part], options.folder / part / name, METHODS[name])
    write_page(options.folder)


def methods_of(part: str) -> list[str]:
    """Those that fit the part's model."""
    left_out = TEXT_ONLY if part == "dinov2" else IMAGES_ONLY
    return [name for name in METHODS if name not in left_out]


def train(part: Mapping[str, Any], folder: Path, method: Any) -> None:
    """One method, all seeds, or what is left of an earlier start."""
    kitout.train(
        model=part["model"],
        method=method,
        data=part["data"],
        train={"seeds": SEEDS},
        evaluate={"generate_examples": 0, **part.get("evaluate", {})},
        output={"folder": str(folder)},
    )


def write_page(folder: Path) -> None:
    """The tables of the page between its two marks, and a CSV of every part, from the runs that are finished."""
    lines = []
    for part, what in PARTS.items():
        runs = {name: folder / part / name for name in methods_of(part)}
        finished = {name: run for name, run in runs.items() if (run / "results.json").is_file()}
        lines += [f"### {what['title']}", ""]
        if finished:
            table = compare_runs(list(finished.values()))
            write_csv(table, CELLS / f"first-{part}.csv")
            lines += ["```text", table.to_text(160), "```", "", f"Cells: [first-{part}.csv](first-{part}.csv).", ""]
            lines += forgetting_lines(finished)
        if missing := [name for name in runs if name not in finished]:
            lines += [f"Not run: {', '.join(missing)}.", ""]
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
