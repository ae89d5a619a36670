"""Search and allocation on three tasks (docs/results/search.md, from one command).

`python studies/search.py [--parts minilm dinov2 smollm2] [--folder runs/search-study]`. A part is a model with its
task: a search under a budget, then LoRA with uniform ranks against ranks by eva, gora, gradient and adaptive ranks, all
with as many trainable parameters, with three seeds. What is finished is not run again; what was not run stays on the
page as it is. It searches and trains nothing by itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetting_table import forgetting_lines
from result_page import write_part

import kitout
from kitout import LoRA
from kitout.compare import compare_runs, write_csv
from kitout.evaluate.compare import format_value
from kitout.files.atomic import write_text
from kitout.format import align_columns, format_duration
from kitout.search.probe_run import probe_sites
from kitout.train.config.load import load
from kitout.train.config.method_field import method_to_dict

SEEDS = [0, 1, 2]
RANK = 4  # of uniform ranks, at every linear site
INSTRUCTION = "Classify the sentiment of this tweet as negative, neutral or positive."
TEXT_SPACE: dict[str, Any] = {
    "method": ["LoRA", "IA3", "Houlsby", "AdaptFormer", "PrefixTuning"],
    "LoRA": {"rank": [2, 4, 8, 16], "targets": ["attn.q attn.v", "all-linear", "mlp.*"]},
    "Houlsby": {"width": [8, 16, 32]},
    "AdaptFormer": {"width": [8, 16, 32, 64]},
}
PARTS: dict[str, dict[str, Any]] = {
    "minilm": {
        "run": {
            "model": "minilm",
            "data": {"train": {"path": "tweets", "limit": 1880}, "validation": 200, "test": 600},
        },
        "space": {
            **TEXT_SPACE, "LoRA": {**TEXT_SPACE["LoRA"], "layers": ["all", "last:3"]}, "lr": {"multipliers": [0.3, 3.0]}
        },
        "budget": {"max_trainable_parameters": 700_000},
    },
    "dinov2": {
        "run": {
            "model": "dinov2-small",
            "data": {
                "train": {"path": "mnist-5k", "limit": 2200}, "validation": 200, "test": 1000, "image_size": 56,
            },
        },
        "space": {
            "method": ["LoRA", "AdaptFormer", "SSF", "VPT", "BitFit"],
            "LoRA": {**TEXT_SPACE["LoRA"], "layers": ["all", "last:6"]},
            "AdaptFormer": {"width": [8, 16, 32, 64]},
            "lr": {"multipliers": [0.3, 3.0]},
        },
        "budget": {"max_trainable_parameters": 700_000},
    },
    "smollm2": {
        "run": {
            "model": "smollm2-135m",
            "data": {
                "train": {"path": "tweets", "format": "label", "limit": 480, "system_prompt": INSTRUCTION},
                "validation": 100,
                "test": 180,
            },
            "train": {"steps": 100, "batch_size": 4},
        },
        "space": {
            **TEXT_SPACE, "LoRA": {**TEXT_SPACE["LoRA"], "layers": ["all", "last:8"]}, "lr": {"multipliers": [0.3, 3.0]}
        },
        "budget": {"max_trainable_parameters": 1_000_000},
        "goal": {"max_forgetting": 0.1},
        "designs": 1,
    },
}  # fmt: skip
PAGE, CELLS = Path("docs/results/search.md"), Path("docs/results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("runs/search-study"))
    parser.add_argument("--page", action="store_true", help="write the page from what is finished, and run nothing")
    options = parser.parse_args()
    for part in () if options.page else options.parts:
        search(PARTS[part], options.folder / part / "search")
        allocate_ranks(PARTS[part], options.folder / part / "ranks")
    write_page(options.folder)


def search(part: Mapping[str, Any], folder: Path) -> None:
    """The search of a part, or what is left of an earlier start."""
    plan = {name: part[name] for name in ("run", "space", "budget", "goal") if name in part}
    kitout.search.run({**plan, "confirm": {"seeds": SEEDS, "designs": part.get("designs", 2)}, "out": str(folder)})


def allocate_ranks(part: Mapping[str, Any], folder: Path) -> None:
    """Uniform ranks against the others, as jobs of one run."""
    if not (folder / "results.json").is_file():
        jobs = folder.parent / "ranks.json"
        if not jobs.is_file():
            write_text(jobs, json.dumps(rank_jobs(part, folder.parent / "probe")))
        kitout.train(
            model=part["run"]["model"],
            data=part["run"]["data"],
            jobs=json.loads(jobs.read_text(encoding="utf-8")),
            train={**part["run"].get("train", {}), "seeds": SEEDS},
            evaluate={"generate_examples": 0, "steps": 0},
            output={"folder": str(folder)},
        )


def rank_jobs(part: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """One job for each way to choose ranks, with as many trainable parameters."""
    uniform = LoRA(rank=RANK, targets="all-linear")
    run = {**part["run"], "method": method_to_dict(uniform), "output": {"folder": str(folder)}}
    found = probe_sites(load(run), by="gradient", gora=True, budget=None).signals
    budget = sum(RANK * site.cost for site in found.values())
    methods: dict[str, LoRA] = {"uniform": uniform}
    for by in ("eva", "gora", "gradient"):
        methods[by] = kitout.search.allocate(found, budget, by)
    methods["adaptive"] = LoRA(rank=RANK, targets="all-linear", adaptive=True)
    return [{"name": name, "method": method_to_dict(method)} for name, method in methods.items()]


def write_page(folder: Path) -> None:
    """The parts of the page that are finished, and a CSV of every table."""
    for part in PARTS:
        results = folder / part / "search" / "search.json"
        if results.is_file():
            figures = json.loads(results.read_text(encoding="utf-8"))
            write_text(CELLS / f"search-{part}.csv", (results.parent / "trials.csv").read_text(encoding="utf-8"))
            lines = [*search_lines(figures), "", f"Every candidate: [search-{part}.csv](search-{part}.csv).", ""]
            write_part(PAGE, f"search {part}", lines + forgetting_lines({"": results.parent / "confirm"}))
        run = folder / part / "ranks"
        if (run / "results.json").is_file():
            table = compare_runs([run])
            write_csv(table, CELLS / f"search-ranks-{part}.csv")
            lines = ["```text", table.to_text(160), "```", ""]
            cells = f"Cells: [search-ranks-{part}.csv](search-ranks-{part}.csv)."
            write_part(PAGE, f"ranks {part}", [*lines, cells, ""])


def search_lines(figures: Mapping[str, Any]) -> list[str]:
    """The confirmation as a table, the answer and the cost."""
    confirmation, designs = figures["confirmation"], {one["name"]: one for one in figures["designs"]}
    rows: list[tuple[str, ...]] = [
        ("design", confirmation["metric"], "seeds", "against the default", "p (Holm)", "trainable")
    ]
    for one in confirmation["designs"]:
        values = [format_value(value, confirmation["share"]) for value in one["by_seed"]]
        difference, against, p_text = one["against_default"], "", ""
        if difference is not None:
            keys = ("difference", "low", "high")
            change, low, high = (format_value(difference[k], confirmation["share"], sign=True) for k in keys)
            against, p_text = f"{change} ({low} to {high})", f"{difference['adjusted']:.2g}"
        mean = format_value(one["mean"], confirmation["share"])
        trainable = f"{designs[one['name']]['trainable']:,}"
        rows.append((design_text(designs[one["name"]]), mean, ", ".join(values), against, p_text, trainable))
    cost = figures["cost"]
    took = (
        f"The search took {cost['trainings']:.2f} trainings of one design "
        f"({format_duration(cost['seconds'])}, measuring included), the confirmation "
        f"{format_duration(cost['confirmation_seconds'])} of training; {len(figures['designs'])} designs were "
        f"tried and {len(figures['refused'])} refused."
    )
    return ["```text", *align_columns(rows), "```", "", f"**{figures['answer']}.** {took}"]


def design_text(design: Mapping[str, Any]) -> str:
    """default: LoRA(rank=8), lr 0.001"""
    method = dict(design["method"])
    name = method.pop("name")
    ranks = method.get("rank")
    if isinstance(ranks, dict):
        method = {**method, "rank": f"{min(ranks.values())} to {max(ranks.values())} at {len(ranks)} sites"}
    settings = ", ".join(f"{key}={value}" for key, value in method.items())
    return f"{design['name']}: {name}({settings}), lr {design['lr']:g}"


if __name__ == "__main__":
    main()
