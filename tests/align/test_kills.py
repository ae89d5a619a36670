"""Stages killed at random moments and at operations on files: the same result to the bit, and no line twice."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.test_run import data_of
from kitout.train.metrics_log import read_metrics
from tiny_models import decoder
from train import subprocess_runs as runs
from train.other_processes import run_in_processes, start_process
from train.test_kills import names, results

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")]

MOMENTS, OPERATIONS, MAX_STARTS = 10, 5, 60  # kills of each kind
STEPS = {"dpo": 6, "kto": 6, "reward": 6, "grpo": 6, "ppo": 6}
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"iterations": 3, "beta": 0.02},  # checkpoints in the middle of a round
    "ppo": {"epochs": 2, "minibatches": 2, "kl_target": 0.5, "kl_horizon": 20},
}


def config_of(kind: str, folder: Path) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "kind": kind, "data": {"train": str(data_of(kind, folder)), "validation": 6, "test": 8},
        "method": {"name": "LoRA", "dropout": 0.0 if kind in LOSSES else 0.1}, "evaluate": {"steps": 4},
        "train": {"steps": STEPS[kind], "save_steps": 1, "lr": 1e-2, "keep_checkpoints": 1},
    }  # fmt: skip
    if kind in LOSSES:
        stage |= {
            "reward": "align.test_run:count_letters", "loss": LOSSES[kind],
            "rollout": {"prompts": 2, "samples": 4, "max_new_tokens": 5},
        }  # fmt: skip
    else:
        stage["train"]["batch_size"] = 4
    model = {"name": str(decoder(folder / "model")), "dtype": "float32"}
    return {"model": model, "output": {"folder": str(folder / "whole")}, "stages": [stage]}


@pytest.mark.parametrize("kind", STEPS)
def test_a_stage_killed_anywhere_ends_as_if_it_never_was(kind: str, tmp_path: Path) -> None:
    config = config_of(kind, tmp_path)
    run_in_processes(time.time)  # the server of processes has started
    start = time.monotonic()
    (num_operations,) = run_in_processes(runs.train_until_killed, config, 0)
    seconds = time.monotonic() - start
    whole, rng, number = tmp_path / "whole", random.Random(kind), 0
    kills = {"moments": 0, "operations": 0}
    out = tmp_path / f"killed-{number}"
    for _ in range(MAX_STARTS):
        if (out / "results.json").is_file():
            assert_same(out, whole)
            number += 1
            out = tmp_path / f"killed-{number}"
        how = "operations" if kills["operations"] < OPERATIONS else "moments"
        if kills[how] == MOMENTS:
            break
        spent = (rng.randint(1, num_operations), 0.0) if how == "operations" else (0, rng.uniform(0.02, 1.0) * seconds)
        process, receiver = start_process(runs.train_until_killed, config | {"output": {"folder": str(out)}}, *spent)
        process.join(120)
        assert process.exitcode in (-9, 0), receiver.recv()
        kills[how] += process.exitcode == -9
    assert kills == {"moments": MOMENTS, "operations": OPERATIONS}
    run_in_processes(runs.train_until_killed, config | {"output": {"folder": str(out)}}, 0)
    assert_same(out, whole)


def assert_same(out: Path, whole: Path) -> None:
    assert results(out) == results(whole)
    for name in ("adapter", "value"):
        file = f"{name}/adapter.safetensors"
        if (whole / file).is_file():
            ours, theirs = (load_file(folder / file) for folder in (out, whole))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    if (whole / "reference.safetensors").is_file():
        ours, theirs = (load_file(folder / "reference.safetensors") for folder in (out, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours_details, theirs_details = (json.loads((one / "results.json").read_text())["align"] for one in (out, whole))
    assert ours_details == theirs_details
    assert read_metrics(out / "completions.jsonl") == read_metrics(whole / "completions.jsonl")
    assert names(out) == names(whole)
    assert {path.name for path in out.rglob(".*")} == {".run.lock"}
