"""What a stage trains goes to other processes: a reward's and a value's scores are the same bits there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align import stage_runs
from align.test_run import SMALL, data_of, stage
from kitout.align import run as stages
from kitout.train.metrics_log import read_metrics
from kitout.train.setup.prepare import PreparedRun
from tiny_models import decoder
from train import subprocess_runs as runs
from train.other_processes import run_in_processes

pytest.importorskip("accelerate")


@pytest.mark.parametrize(
    ("kind", "adapter", "answer"),
    [("reward", "reward", "last"), pytest.param("ppo", "value", "all", marks=pytest.mark.slow)],
)
def test_scalar_heads_give_the_same_scores_in_another_process(
    kind: str, adapter: str, answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    write_outputs = stages.write_outputs

    def end(prepared: PreparedRun, *rest: Any) -> Any:
        found[:] = [stage_runs.scores(prepared.kit, adapter, answer), prepared.kit.config._attn_implementation]
        return write_outputs(prepared, *rest)

    monkeypatch.setattr(stages, "write_outputs", end)
    model, out = decoder(tmp_path / "model"), tmp_path / "run"
    stage(kind, model, data_of(kind, tmp_path), out)
    scores, attention = found
    folder = out / ("value" if kind == "ppo" else "adapter")
    (elsewhere,) = run_in_processes(stage_runs.scores_of_folder, model, folder, answer, attention)
    assert elsewhere == scores
    assert len(set(scores)) > 3


@pytest.mark.slow
def test_a_stage_starts_from_an_adapter_of_another_process(tmp_path: Path) -> None:
    model = {"name": str(decoder(tmp_path / "model")), "dtype": "float32"}
    run_in_processes(runs.train_until_killed, {
        "model": model, "data": {"train": str(data_of("sft", tmp_path)), "validation": 0, "test": 8},
        "train": SMALL, "output": {"folder": str(tmp_path / "sft")},
    }, 0)  # fmt: skip
    start, out = tmp_path / "sft" / "adapter", tmp_path / "dpo"
    trained = load_file(start / "adapter.safetensors")
    stage("dpo", Path(model["name"]), data_of("dpo", tmp_path), out, **{"from": str(start)})
    assert read_metrics(out / "metrics.jsonl")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # it is its reference
    assert json.loads((out / "results.json").read_text())["align"]["reference"] == "reference"
    assert all(value.equal(trained[name]) for name, value in load_file(start / "adapter.safetensors").items())
    assert load_file(out / "adapter" / "adapter.safetensors").keys() == trained.keys()
