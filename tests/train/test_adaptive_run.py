"""Runs of LoRA(adaptive=True): what is saved, the best checkpoint, stopping early, the same bits after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import kitout
from kitout.train.loop.trainer import JobTrainer
from tiny_models import encoder, jsonl, reviews

pytest.importorskip("accelerate")
STEPS = 10  # ranks are final after 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("inputs")
    return {"model": str(encoder(root / "model")), "data": str(jsonl(root / "data.jsonl", reviews(60)))}


def train(inputs: dict[str, str], out: Path, **more: Any) -> dict[str, Any]:
    config = {
        "model": {"name": inputs["model"], "dtype": "float32"}, "data": {"train": inputs["data"], "validation": 10},
        "method": {"name": "LoRA", "rank": 2, "targets": "all-linear", "adaptive": True},
        "train": {"batch_size": 8, "steps": STEPS, "save_steps": 1, "lr": 1e-2, **more},
        "evaluate": {"steps": 1}, "output": {"folder": str(out)},
    }  # fmt: skip
    figures: dict[str, Any] = dict(kitout.train(config, log=lambda _line: None).figures)
    return figures


def test_a_run_saves_a_plain_lora_within_its_budget_whatever_stops_it(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = JobTrainer.evaluate

    def rising(self: JobTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate(self, *args, **kwargs) | {"eval_loss": float(self.state.global_step)}

    monkeypatch.setattr(JobTrainer, "evaluate", rising)
    results = train(inputs, tmp_path / "whole")
    record = json.loads((tmp_path / "whole" / "adapter" / "adapter.json").read_text())
    assert record["method"] == "LoRA"
    assert {"adaptive", "start"}.isdisjoint(record["settings"])
    assert results["best_step"] == STEPS // 2, "the lowest loss of those whose ranks are final"
    trained = load_file(tmp_path / "whole" / "adapter" / "adapter.safetensors")
    count = sum(value.numel() for name, value in trained.items() if name.endswith((".a", ".b")))
    budget = 2 * 2 * (4 * (48 + 48) + 2 * (48 + 96))  # rank 2 everywhere
    assert budget - (48 + 96) < count <= budget
    ranks = {len(value) for name, value in trained.items() if name.endswith(".a")}
    assert len(ranks) > 1

    step = JobTrainer.training_step
    for number, stop_at in enumerate((3, 8)):

        def stopping(self: JobTrainer, *args: Any, at: int = stop_at, **kwargs: Any) -> Any:
            if self.state.global_step == at:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        out = tmp_path / f"stopped{number}"
        with monkeypatch.context() as patch:
            patch.setattr(JobTrainer, "training_step", stopping)
            with pytest.raises(KeyboardInterrupt):
                train(inputs, out)
        train(inputs, out)
        again = load_file(out / "adapter" / "adapter.safetensors")
        assert again.keys() == trained.keys()
        assert all((again[name] == trained[name]).all() for name in trained)


def test_one_that_stops_early_is_cut_at_once_and_says_so(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = JobTrainer.training_step

    def ending(self: JobTrainer, *args: Any, **kwargs: Any) -> Any:
        self.control.should_training_stop = self.state.global_step == 2
        return step(self, *args, **kwargs)

    monkeypatch.setattr(JobTrainer, "training_step", ending)
    train(inputs, tmp_path / "out")
    assert "stopped after step 3 of 10, before its ranks were final" in (tmp_path / "out" / "report.html").read_text()
    record = json.loads((tmp_path / "out" / "adapter" / "adapter.json").read_text())
    assert "adaptive" not in record["settings"]
