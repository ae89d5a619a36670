"""Whole searches on tiny models: every candidate as its own run, budgets, resume after a kill, the folder."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import kitout
from kitout.cli import app
from kitout.errors import ConfigError
from kitout.search.population.design import Design
from kitout.search.population.rung import Length, read_rung, train_rung
from kitout.train.checkpoints import read_progress
from kitout.train.config.load import load
from kitout.train.config.yaml_file import read_yaml
from search.searches import loaded, tiny_plan
from train import subprocess_runs as runs
from train.other_processes import start_process

pytest.importorskip("optuna")
pytest.importorskip("accelerate")
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[Path, list[str]]:
    lines: list[str] = []
    result = kitout.search.run(tiny_plan(root), log=lines.append)
    assert result.confirmation is not None
    return result.folder, lines


def values_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Of one candidate in the last checkpoint of a rung."""
    (checkpoint,) = (folder / "checkpoints").glob("checkpoint-*")
    return {
        key.removeprefix("value."): value
        for key, value in load_file(checkpoint / "state.safetensors").items()
        if key.startswith(f"value.{name}/")
    }


def test_every_candidate_is_as_its_own_run_stopped_there(
    root: Path, finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Whoever was beside it, and through every rung it went."""
    folder, _ = finished
    plan, start = loaded(root), json.loads((folder / "start.json").read_text())
    length = Length(**start["length"])
    designs = {
        one["name"]: Design.from_dict(one)
        for file in sorted(folder.glob("proposals-*.json"))
        for one in json.loads(file.read_text())["designs"]
    }
    assert len(designs) == 8
    compared = set()
    for rung in sorted((folder / "rungs").iterdir(), reverse=True):
        kept = read_rung(rung)
        assert kept is not None
        for name in kept.names:
            if name in compared:  # further up already
                continue
            compared.add(name)
            alone = tmp_path / f"{rung.name}-{name}"
            own = train_rung(plan, length, [designs[name]], alone, kept.end, {}, lambda _line: None)
            ours, theirs = values_of(rung, name), values_of(alone, name)
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value, rtol=TOLERANCE, atol=TOLERANCE)
            assert own.losses[name] == pytest.approx(kept.losses[name], rel=1e-6)
    assert compared == set(designs)


def test_what_is_written(finished: tuple[Path, list[str]]) -> None:
    folder, lines = finished
    figures = json.loads((folder / "search.json").read_text())
    names = [one["name"] for one in figures["confirmation"]["designs"]]
    assert names[0] == "default"
    assert len(figures["rungs"]) == 3
    assert [one["origin"] for one in figures["designs"]][:3] == ["the run's own", "ranks by gradient", "ranks by eva"]
    assert figures["cost"]["trainings"] >= 8 * 0.25 + 4 * 0.25 + 2 * 0.5
    recommended = read_yaml(folder / "recommended.yaml")
    assert recommended["train"]["steps"] == 8
    config = load(recommended)  # a run of `kitout train`
    assert config.train.batch_size == 4
    trials = (folder / "trials.csv").read_text().splitlines()
    assert len(trials) == 1 + 8
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert figures["answer"] in report
    assert "gradient energy" in report
    assert all((folder / one).is_dir() for folders in figures["adapters"].values() for one in folders)
    printed = "\n".join(lines)
    assert f"report    {folder / 'report.html'}" in printed
    assert f"adapters  {folder / 'confirm' / 'adapter'}: default, " in printed
    assert "after rung 1:" in printed
    assert figures["answer"] in printed
    assert "kitout train" in printed
    assert {path.name for path in folder.rglob(".*")} <= {".run.lock"}


def test_the_time_of_a_rung_is_its_own(finished: tuple[Path, list[str]]) -> None:
    """A checkpoint's seconds are of the whole training, the rungs before included."""
    folder, _ = finished
    _, *later = (rung for rung in sorted((folder / "rungs").iterdir()) if "-" not in rung.name)
    spent = max(
        read_progress(next((rung / "checkpoints").glob("checkpoint-*")))["seconds"] for rung in folder.glob("rungs/0*")
    )
    assert later
    for rung in later:
        kept, progress = read_rung(rung), read_progress(next((rung / "checkpoints").glob("checkpoint-*")))
        assert kept is not None
        assert 0 < kept.training_seconds < progress["seconds"]
        assert kept.training_seconds >= progress["seconds"] - spent - 1e-9  # whoever it goes on from took no longer
        spent = progress["seconds"]


def test_the_same_plan_shows_it_and_another_is_refused(root: Path, finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    before = (folder / "search.json").read_bytes()
    lines: list[str] = []
    result = kitout.search.run(tiny_plan(root), log=lines.append)
    assert (folder / "search.json").read_bytes() == before
    assert result.recommended
    assert any("finished" in line for line in lines)
    with pytest.raises(ConfigError, match="candidates: 8 there, 6 requested"):
        kitout.search.run(tiny_plan(root, candidates=6), log=lines.append)


def test_no_candidate_over_the_budget_is_trained(root: Path, tmp_path: Path) -> None:
    """The run's own design is, for comparison, in the confirmation alone."""
    out = tmp_path / "out"
    plan = tiny_plan(
        root, out=str(out), budget={"max_trainable_parameters": 1000}, candidates=6, halving={"factor": 6, "first": 0.5}
    )
    result = kitout.search.run(plan, log=lambda _line: None)
    figures = result.figures
    own = next(one for one in figures["designs"] if one["name"] == "default")
    assert own["over_budget"] == f"{own['trainable']:,} trainable parameters of 1,000"
    trained = [one["name"] for one in figures["rungs"][0]["decisions"]]
    assert "default" not in trained
    assert all(one["trainable"] <= 1000 for one in figures["designs"] if one["name"] in trained)
    assert figures["refused"]
    assert figures["recommended"] != "default"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"goal": {"metric": "bleu"}}, "goal.metric=bleu is not measured here"),
        ({"goal": {"max_forgetting": 0.1}}, "goal.max_forgetting asks a language model"),
        ({"budget": {"max_trainable_parameters": 10}}, "no design of the space can be trained within the budget"),
        ({"budget": {"examples": 20}}, "budget.examples=20"),
    ],
)
def test_errors_before_anything_is_trained(root: Path, tmp_path: Path, sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        kitout.search.run(tiny_plan(root, out=str(tmp_path / "out"), **sections), log=lambda _line: None)
    assert not (tmp_path / "out" / "rungs").exists()


def test_a_folder_of_something_else_is_not_touched(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="it holds thesis"):
        kitout.search.run(tiny_plan(root, out=str(tmp_path)), log=lambda _line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_verb(root: Path, tmp_path: Path) -> None:
    example = CliRunner().invoke(app, ["search", "--example"])
    assert "candidates: 16" in example.output
    settings = ["candidates=2", "run.train.steps=4", f"out={tmp_path / 'out'}"]
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(tiny_plan(root)))
    done = CliRunner().invoke(app, ["search", str(file), "--dry-run", *settings])
    assert done.exit_code == 0, done.output
    assert "2 candidates: LoRA, IA3, Houlsby" in done.output
    assert not (tmp_path / "out" / "rungs").exists()
    wrong = CliRunner().invoke(app, ["search", str(file), "candidats=3"])
    assert wrong.exit_code == 1
    assert "did you mean 'candidates'" in wrong.output
    assert "one plan.yaml is required" in CliRunner().invoke(app, ["search", "candidates=3"]).output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_search_killed_anywhere_ends_as_if_it_never_was(root: Path, finished: tuple[Path, list[str]]) -> None:
    plan = tiny_plan(root, out=str(root / "killed"))
    rng, kills = random.Random(0), 0
    while not (root / "killed" / "search.json").is_file():
        seconds = rng.uniform(0.5, 6.0) if kills < 25 else 0.0
        process, receiver = start_process(runs.train_until_killed, plan, 0, seconds)
        process.join(300)
        assert process.exitcode in (-9, 0), receiver.recv()
        kills += process.exitcode == -9
    assert kills >= 3
    ours, theirs = (json.loads((folder / "search.json").read_text()) for folder in (root / "killed", finished[0]))
    for figures in (ours, theirs):
        for key in ("latency", "cost"):
            figures.pop(key)
        for rung in figures["rungs"]:
            for key in ("seconds", "training_seconds", "memory"):
                rung.pop(key)
    assert ours == theirs
