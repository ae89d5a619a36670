"""Whole runs killed at operations on files and at random moments: the same result to the bit, and nothing stays."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kitout.train.metrics_log import read_metrics
from tiny_models import decoder, jsonl, reviews
from train import subprocess_runs as runs
from train.other_processes import run_in_processes, start_process

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")

STEPS, MAX_KILLS = 10, 23  # kills of each kind


@pytest.mark.slow
@pytest.mark.parametrize("how", ["operations", "moments"])
def test_a_run_killed_anywhere_ends_as_if_it_never_was(tmp_path: Path, how: str) -> None:
    model = decoder(tmp_path / "model")
    rows = [{"prompt": f"{r['text']}:", "completion": f" {r['label']}"} for r in reviews(40)]
    config = {
        "model": {"name": str(model), "dtype": "float32"}, "data": str(jsonl(tmp_path / "d.jsonl", rows)),
        "method": {"name": "LoRA", "dropout": 0.1}, "output": {"folder": str(tmp_path / "whole")},
        "train": {"batch_size": 4, "steps": STEPS, "save_steps": 1, "lr": 1e-2, "keep_checkpoints": 1},
        "evaluate": {"steps": 3, "generate_examples": 2},
    }  # fmt: skip
    (num_operations,) = run_in_processes(runs.train_until_killed, config, 0)
    out = tmp_path / "killed"
    config["output"] = {"folder": str(out)}
    rng, kills = random.Random(how), 0
    while not (out / "results.json").is_file():
        # a start does some before it trains: so late that each one gets a little further, or nearly
        spent = (rng.randint(1, num_operations // 3), 0.0) if how == "operations" else (0, rng.uniform(0.1, 4.0))
        process, receiver = start_process(runs.train_until_killed, config, *(spent if kills < MAX_KILLS else (0, 0.0)))
        process.join(120)
        assert process.exitcode in (-9, 0), receiver.recv()
        kills += process.exitcode == -9
    assert kills >= 3
    whole = tmp_path / "whole"
    assert results(out) == results(whole)
    ours, theirs = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (out, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert names(out) == names(whole)
    assert {path.name for path in out.rglob(".*")} == {".run.lock"}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def results(folder: Path) -> tuple[Any, ...]:
    """What the run has measured, without times."""
    logged = read_metrics(folder / "metrics.jsonl")
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "train_loss")
    lines = [{k: v for k, v in line.items() if k in kept or k.startswith("eval_")} for line in logged]
    figures = json.loads((folder / "results.json").read_text())
    return lines, figures["comparisons"], figures["best_step"], figures["tokens"], figures["examples"]
