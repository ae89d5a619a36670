"""Every method on three tasks, three seeds: quality, forgetting and cost (docs/results/first.md, from one command).

`python studies/first.py [--parts minilm dinov2 smollm2] [--methods LoRA ...] [--folder runs/first]`. A part is a model
with its task, each method one run of `kitout train` with `train.seeds`, at kitout's own learning rates. Of a finished
run the files that `kitout compare` reads are kept beside the page: it is not run again, on any machine, and every test
of the page can be redone. The page marks what was not run. It trains nothing by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetting_table import forgetting_lines
from result_page import write_part

import kitout
from kitout.compare import compare_runs, write_csv
from kitout.files.atomic import write_text
from kitout.train.run_folder import RESULTS_FILE, RUN_FILE, SCORES_FILE

SEEDS = [0, 1, 2]
INSTRUCTION = "Classify the sentiment of this tweet as negative, neutral or positive."
PARTS: dict[str, dict[str, Any]] = {
    "minilm": {
        "model": "minilm",
        "data": {"train": {"path": "tweets", "limit": 1880}, "validation": 0, "test": 600},
    },
    "dinov2": {
        "model": "dinov2-small",
        "data": {"train": {"path": "mnist-5k", "limit": 2000}, "validation": 0, "test": 1000, "image_size": 56},
    },
    "smollm2": {
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
    "PrefixTuning+encoder": {"name": "PrefixTuning", "encoder": 512},
    "VPT-shallow": {"name": "VPT", "deep": False},
    "VPT-deep": {"name": "VPT", "deep": True},
    "PartialFineTuning": {"name": "PartialFineTuning", "last": 2},
    "FullFineTuning": "FullFineTuning",
}
TEXT_ONLY, IMAGES_ONLY = ("PromptTuning", "PrefixTuning+encoder"), ("VPT-shallow", "VPT-deep")
PAGE, CELLS = Path("docs/results/first.md"), Path("docs/results")
KEPT = CELLS / "first"  # a folder for each part and method; `kitout compare docs/results/first/smollm2/*` reads them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("runs/first"))
    parser.add_argument("--page", action="store_true", help="write the page from what is finished, and run nothing")
    options = parser.parse_args()
    for part in () if options.page else options.parts:
        for name in options.methods:
            if name in methods_of(part) and not is_finished(KEPT / part / name):
                train(PARTS[part], options.folder / part / name, METHODS[name])
                keep(options.folder / part / name, KEPT / part / name)
    write_page()


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


def keep(run: Path, kept: Path) -> None:
    """What the page is made of. The results last: a folder that has them is whole."""
    kept.mkdir(parents=True, exist_ok=True)
    for name in (RUN_FILE, SCORES_FILE):
        shutil.copyfile(run / name, kept / name)
    results = json.loads((run / RESULTS_FILE).read_text(encoding="utf-8"))
    for name in ("examples", "next"):  # texts of the data, and commands on the adapters, which are not kept
        results.pop(name, None)
    write_text(kept / RESULTS_FILE, json.dumps(results, indent=1) + "\n")


def is_finished(kept: Path) -> bool:
    return (kept / RESULTS_FILE).is_file()


def write_page() -> None:
    """The tables between the page's marks, and a CSV of every part, from the runs that are kept.

    A part that has none stays as it is.
    """
    for part in PARTS:
        finished = {name: KEPT / part / name for name in methods_of(part) if is_finished(KEPT / part / name)}
        if not finished:
            continue
        table = compare_runs(list(finished.values()))
        write_csv(table, CELLS / f"first-{part}.csv")
        lines = ["```text", table.to_text(160), "```", ""]
        lines += [f"Cells: [first-{part}.csv](first-{part}.csv).", "", *forgetting_lines(finished)]
        if missing := [name for name in methods_of(part) if name not in finished]:
            lines += [f"Not run: {', '.join(missing)}.", ""]
        write_part(PAGE, part, lines)


if __name__ == "__main__":
    main()
