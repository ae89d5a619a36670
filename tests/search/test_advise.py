"""`advise`: which runs are near, how they are listed, and what it says where there are too few."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kitout
from kitout.cli import app
from kitout.search.advise import MIN_RUNS, PlannedRun, advise_from, distance, model_shape, plan_of
from kitout.train.config.load import load
from kitout.train.measure.run_history import HISTORY_FILE, HistoryRow, ModelShape, append_rows
from kitout.train.objectives.tasks import TASKS
from tiny_models import decoder, encoder, jsonl, reviews

DESIGN = {"method": "LoRA", "settings": {"rank": 4}, "lr": 1e-3, "steps": 100, "batch_size": 16}
ROW = HistoryRow(
    run="0", day="2026-11-30", version="0", source="train", model_kind="bert", depth=4, width=64, parameters=100_000,
    task="classification", examples=1000, design=json.dumps(DESIGN), seed=0, metric="accuracy", baseline="base",
    score=0.9, gain=0.2, low=0.1, high=0.3, higher_is_better=True, is_share=True, num_test=10, diverged=False,
    trainable=4096, seconds=90.0, memory=0, device="cpu", dtype="float32",
)  # fmt: skip
PLANNED = PlannedRun(ModelShape("bert", 4, 64, 100_000), "classification", 1000)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.0),
        ({"parameters": 400_000}, 2.0),
        ({"depth": 8}, 0.5),
        ({"width": 32}, 0.5),
        ({"examples": 250}, 2.0),
        ({"examples": None}, 0.0),
        ({"task": "regression"}, 4.0),
        ({"model_kind": "llama"}, 1.0),
        ({"model_kind": "llama", "parameters": 50_000, "width": 128}, 2.5),
    ],
)
def test_the_distance_is_what_the_docs_say(changes: dict[str, object], expected: float) -> None:
    assert distance(PLANNED, replace(ROW, **changes)) == pytest.approx(expected)  # type: ignore[arg-type]


def test_the_nearest_come_first_and_seeds_are_one() -> None:
    rows = [replace(ROW, run=str(i), examples=1000 * 2**i) for i in range(6)]
    rows += [replace(ROW, run="seeds", seed=s, gain=g, parameters=110_000) for s, g in enumerate([0.1, 0.2, 0.4])]
    rows += [replace(ROW, run="far", parameters=100_000_000)]
    advice = advise_from(rows, PLANNED, 3)
    assert [run.rows[0].run for run in advice.nearest] == ["0", "seeds", "1"]
    assert (advice.num_near, advice.num_runs) == (7, 8)
    text = str(advice)
    assert "LoRA(rank=4), lr 0.001, 100 steps of 16" in text
    assert "+20.0 (+10.0 to +30.0)" in text
    assert "+23.3 (3 seeds: +10.0 to +40.0)" in text
    assert "3 nearest of 8 runs; 4 more are near" in text
    assert json.loads(json.dumps(advice.to_dict()))["nearest"][1]["rows"][2]["gain"] == 0.4


def test_of_equally_near_runs_the_newest_is_first() -> None:
    advice = advise_from([replace(ROW, run=str(i)) for i in range(MIN_RUNS)], PLANNED, 2)
    assert [run.rows[0].run for run in advice.nearest] == ["4", "3"]


def test_a_diverged_run_and_one_without_a_test_split_are_called_so() -> None:
    rows = [replace(ROW, run=str(i)) for i in range(MIN_RUNS)]
    rows[0], rows[1] = replace(rows[0], diverged=True), replace(rows[1], gain=None, metric="")
    rows[2] = replace(rows[2], baseline="most frequent label")
    text = str(advise_from(rows, PLANNED, 10))
    assert all(words in text for words in ("diverged", "not measured", "over most frequent label"))


def test_too_few_are_counted() -> None:
    rows = [replace(ROW, run=str(i)) for i in range(MIN_RUNS - 1)] + [replace(ROW, run="far", parameters=10**9)]
    advice = advise_from(rows, PLANNED, 10)
    assert not advice.nearest
    assert (
        f"too few runs like this one (bert 4 x 64, 0.1M, classification, 1,000 examples): {MIN_RUNS - 1} near it"
        in (str(advice))
    )


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_the_shape_without_weights_is_that_of_the_kit(task: str, tmp_path: Path) -> None:
    import transformers

    folder = (decoder if task == "causal_lm" else encoder)(tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(folder)
    model_config = load({"model": str(folder), "data": "x"}).model
    found = model_shape(model_config, TASKS[task], config, 3)
    kwargs = {} if task == "causal_lm" else {"num_labels": 3}
    base = getattr(transformers, TASKS[task].auto_model).from_pretrained(folder, **kwargs)
    kit = kitout.attach(base)
    assert found == ModelShape.of(kit.survey.towers, base.config, sum(p.numel() for p in base.parameters()))


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_RUNS", str(tmp_path / "history"))
    model, data = encoder(tmp_path / "model"), jsonl(tmp_path / "data.jsonl", reviews(60))
    args = ["advise", f"model.name={model}", f"data.train={data}"]

    def call(*more: str) -> str:
        result = CliRunner().invoke(app, [*args, *more])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "too few runs like this one (bert 2 x 48" in call()
    planned = plan_of(load({"model": str(model), "data": str(data)}), lambda _line: None)
    assert (planned.task, planned.examples) == ("classification", 51)
    append_rows(tmp_path / "history" / HISTORY_FILE, [replace(ROW, run=str(i)) for i in range(MIN_RUNS)])
    found = json.loads(call("--json", "--limit", "2"))
    assert [run["design"] for run in found["nearest"]] == [DESIGN, DESIGN]
    monkeypatch.setenv("KITOUT_RUNS", "off")
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1
    assert "KITOUT_RUNS=off keeps no rows" in result.stderr
