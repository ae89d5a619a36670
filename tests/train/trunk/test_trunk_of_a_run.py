"""Whole text runs with train.trunk=auto: the numbers of a run without, what is said of it, and what a kill leaves."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kitout
from kitout.train.metrics_log import read_metrics
from kitout.train.trunk import choose
from tiny_models import decoder, encoder, jsonl, reviews
from train import subprocess_runs as runs
from train.other_processes import run_in_processes, start_process

pytest.importorskip("accelerate")
MAX_KILLS = 12


def settings(model: Path, folder: Path, out: str, **train: Any) -> dict[str, Any]:
    data = folder / "data.jsonl"
    if not data.exists():
        rows = reviews(40)
        if model.name == "decoder":
            rows = [{"prompt": f"{row['text']}:", "completion": f" {row['label']}"} for row in rows]
        jsonl(data, rows)
    return {
        "model": {"name": str(model), "dtype": "float32"}, "data": str(data),
        "method": {"name": "LoRA", "layers": "last:1", "dropout": 0.1}, "output": {"folder": str(folder / out)},
        "train": {"batch_size": 8, "steps": 10, "micro_batch_size": 4, "lr": 1e-2, "trunk": "auto"} | train,
        "evaluate": {"steps": 5, "generate_examples": 2},
    }  # fmt: skip


def logged(folder: Path) -> list[float]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [row[key] for row in rows for key in ("loss", "eval_loss") if key in row]


@pytest.mark.parametrize("make", [decoder, encoder])
def test_a_run_has_the_losses_of_one_without(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "MAX_RATIO", float("inf"))
    monkeypatch.setattr(choose, "MEMORY_SHARE", 0.0)
    model, lines = make(tmp_path / make.__name__), []
    kitout.train(settings(model, tmp_path, "auto"), log=lines.append)
    kitout.train(settings(model, tmp_path, "off", trunk="off"), log=lambda _: None)
    auto, off = tmp_path / "auto", tmp_path / "off"
    assert logged(auto) == pytest.approx(logged(off), rel=1e-6)
    results = [json.loads((folder / "results.json").read_text()) for folder in (auto, off)]
    assert list(results[0]["trunk"]) == ["adapter"]
    assert "training examples (" in results[0]["trunk_choice"]
    assert f"frozen trunk: {results[0]['trunk_choice']}" in lines
    assert "frozen trunk" in (auto / "report.html").read_text()
    assert (results[1]["trunk"], results[1]["trunk_choice"]) == ({}, "")
    assert not list(auto.rglob("*trunk.bin*"))


def test_a_dry_run_says_what_it_would_choose_and_writes_no_file(tmp_path: Path) -> None:
    lines: list[str] = []
    kitout.train(settings(decoder(tmp_path / "decoder"), tmp_path, "dry"), dry_run=True, log=lines.append)
    assert any(line.startswith("frozen trunk: ") for line in lines)
    assert not list(tmp_path.rglob("*trunk.bin*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_run_killed_at_random_ends_as_if_it_never_was(tmp_path: Path) -> None:
    model = decoder(tmp_path / "decoder")
    whole, killed = (settings(model, tmp_path, name, save_steps=1, batch_size=4) for name in ("whole", "killed"))
    run_in_processes(runs.train_with_trunk_until_killed, whole, 0)
    out, rng, kills = tmp_path / "killed", random.Random(0), 0
    while not (out / "results.json").is_file():
        seconds = rng.uniform(0.5, 6.0) if kills < MAX_KILLS else 0.0
        process, receiver = start_process(runs.train_with_trunk_until_killed, killed, 0, seconds)
        process.join(120)
        assert process.exitcode in (-9, 0), receiver.recv()
        kills += process.exitcode == -9
    assert logged(out) == logged(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(out.rglob("*trunk.bin*"))
