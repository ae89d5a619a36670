"""A search's rungs over 16 candidates against one whole training of the default design, on SmolLM2's real weights.

Tweets as instructions; LoRA, IA3, Houlsby, AdaptFormer and prefix tuning at many sizes; 16 candidates, factor 4 from
1/16: 2.50 trainings. Each case is a process of its own, one after the other, in rounds. The search's time holds
loading, timing, measuring and proposing, the training's its steps alone. 16 trainings alone would take 16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Line, Times

LENGTHS = {"short": (16, 8, 12), "full": (125, 16, 100)}  # steps, batch, validation examples
MOST_TIME, MOST_MEMORY = 3.0, 1.3


def run(rounds: int = 1, length: str = "short", threads: int = 2) -> list[Line]:
    times: dict[str, list[float]] = {"training": [], "search": []}
    memory: dict[str, list[int]] = {"training": [], "search": []}
    steps_alone: dict[str, float] = {}
    for _ in range(rounds):
        for case in times:
            found = in_process(case, length, threads)
            times[case].append(found["seconds"])
            memory[case].append(found["memory"])
            steps_alone[case] = min(steps_alone.get(case, float("inf")), found["steps"])
            trainings = found["trainings"]
    measured = Times(times)
    steps, batch, validation = LENGTHS[length]
    detail = f"{trainings:.2f} trainings; " + ", ".join(
        f"{case} {measured.best(case):.0f} s, of which steps {steps_alone[case]:.0f} s" for case in times
    )
    detail += f" (steps alone {steps_alone['search'] / steps_alone['training']:.2f} x)"
    detail += f"; {steps} steps of {batch}, {validation} validation examples"
    ratio, peak = measured.ratio("search", "training"), min(memory["search"]) / min(memory["training"])
    peaks = ", ".join(f"{case} {min(values) / 2**20:,.0f} MiB" for case, values in memory.items())
    return [
        Line("16 candidates against one training of the default", measured.ratio_text("search", "training"),
             f"<= {MOST_TIME:.1f} x", ratio <= MOST_TIME, detail),
        Line("the same, peak memory", f"{peak:.2f} x", f"<= {MOST_MEMORY:.1f} x", peak <= MOST_MEMORY, peaks),
    ]  # fmt: skip


def in_process(case: str, length: str, threads: int) -> dict[str, Any]:
    """One case, from the start of its own process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, case, "--length", length, "--threads", str(threads), "--folder", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def plan_of(length: str, folder: Path) -> dict[str, Any]:
    steps, batch, validation = LENGTHS[length]
    source = {
        "path": "tweets", "format": "label", "limit": steps * batch + validation + 50,
        "system_prompt": "Classify the sentiment of this tweet as negative, neutral or positive.",
    }  # fmt: skip
    return {
        "run": {
            "model": "smollm2-135m",
            "data": {"train": source, "validation": validation, "test": 50},
            "train": {"steps": steps, "batch_size": batch},
        },
        "space": {
            "method": ["LoRA", "IA3", "Houlsby", "AdaptFormer", "PrefixTuning"],
            "LoRA": {"rank": [2, 4, 8, 16], "targets": ["attn.q attn.v", "all-linear"], "layers": ["all", "last:8"]},
            "Houlsby": {"width": [8, 16, 32]},
            "AdaptFormer": {"width": [8, 16, 32]},
        },
        "budget": {"examples": round(2.5 * steps * batch) + batch},
        "out": str(folder / "search"),
    }


def child(case: str, length: str, folder: Path) -> dict[str, Any]:
    """What one case took, in this process."""
    import time

    from kitout.search.plan.load import load_plan
    from kitout.search.population.design import Design
    from kitout.search.population.rung import Length, train_rung
    from kitout.search.runner import prepare_population, train_rungs
    from kitout.search.search_folder import open_search_folder

    plan, lines = load_plan(plan_of(length, folder)), []
    with open_search_folder(plan) as opened:
        begun = time.perf_counter()
        population, found = prepare_population(plan, opened, lines.append)
        if case == "search":
            train_rungs(population, opened, lines.append)
            seconds = time.perf_counter() - begun
            done = [result for results in population.results for result in results]
            whole = population.length.steps * population.length.batch_size
            return {
                "seconds": seconds, "memory": max(result.memory for result in done),
                "trainings": population.num_examples() / whole,
                "steps": sum(result.training_seconds for result in done),
            }  # fmt: skip
        population.look.prepared.kit.detach()
        population.look = None
        begun = time.perf_counter()  # the run loads its own base
        design = Design.from_dict(found["default"])
        length_of = Length(**found["length"])
        result = train_rung(plan, length_of, [design], folder / "alone", length_of.steps, {}, lines.append)
        return {
            "seconds": time.perf_counter() - begun, "memory": result.memory, "trainings": 1.0,
            "steps": result.training_seconds,
        }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=["training", "search"])
    parser.add_argument("--length", choices=LENGTHS, default="short")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    print(json.dumps(child(options.case, options.length, options.folder)))
