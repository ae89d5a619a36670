"""Stages over answers that are there, under two processes: the results of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align.test_run import data_of
from kitout.train.metrics_log import read_metrics
from tiny_models import decoder
from train import subprocess_runs as runs
from train.fixtures import far
from train.other_processes import run_in_processes

pytest.importorskip("accelerate")
TIMES = ("seconds", "tokens_per_second", "processor_seconds", "memory", "train_runtime", "train_samples_per_second",
         "train_steps_per_second")  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {name: {} for name in ("dpo", "orpo", "simpo", "kto", "reward")}
KINDS["ipo"] = {"variant": "ipo"}


def config_of(name: str, folder: Path) -> dict[str, Any]:
    kind = "dpo" if name == "ipo" else name
    return {
        "model": {"name": str(decoder(folder / "model")), "dtype": "float32", "device": "cpu"},
        "stages": [{
            "kind": kind, "loss": KINDS[name], "evaluate": {"steps": 2},
            "data": {"train": str(data_of(kind, folder)), "validation": 7, "test": 9},
            "train": {"steps": 5, "lr": 1e-3, "batch_size": 5, "micro_batch_size": 2},
        }],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    run_in_processes(runs.train_until_killed, config | {"output": {"folder": str(one)}}, 0)
    run_in_processes(runs.train_until_killed, config | {"output": {"folder": str(two)}}, 0, processes=2)
    ours, theirs = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (two, one))
    assert far(ours, theirs) <= 1e-6
    for mine, expected in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (two, one)), strict=True):
        measured = {name: value for name, value in expected.items() if name not in TIMES}
        assert {name: mine[name] for name in measured} == pytest.approx(measured, rel=1e-5, abs=1e-6)
    ours_found, theirs_found = (
        json.loads((folder / "results.json").read_text())["comparisons"] for folder in (two, one)
    )
    assert ours_found == theirs_found
