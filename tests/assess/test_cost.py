"""What training an adapter took and what its files take (`kitout eval --cost`): its own share, or why it is blank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kitout
from kitout.assess.cost import cost_notes, measure_cost
from kitout.assess.training_cost import folder_bytes, read_training_cost
from kitout.cli import app
from tiny_models import encoder, jsonl, reviews

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cost")
    jobs = [{"name": "a", "method": "LoRA", "train": {"seeds": [0, 1]}}, {"name": "b", "method": "IA3"}]
    kitout.train(
        {
            "model": {"name": str(encoder(root / "model")), "dtype": "float32"},
            "data": {"train": str(jsonl(root / "d.jsonl", reviews(24))), "test": 0, "validation": 0},
            "train": {"steps": 3, "batch_size": 4},
            "output": {"folder": str(root / "run")},
            "jobs": jobs,
        },
        log=lambda _: None,
    )
    return root / "run"


def test_each_adapter_has_its_own_share(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    costs = {name: read_training_cost(run / "adapter" / name) for name in ("a-s0", "a-s1", "b")}
    assert sum(one.amount or 0 for one in costs.values()) == results["tokens"]
    assert 0 < sum(one.seconds or 0 for one in costs.values()) <= results["seconds"]
    for name, one in costs.items():
        assert one.seconds == next(row["seconds"] for row in results["adapters"] if row["name"] == name)
        assert (one.unit, one.num_adapters, one.unknown) == ("tokens", 3, "")
        assert one.memory == results["memory"] > 0


def test_the_verb_shows_training_and_files(run: Path, tmp_path: Path) -> None:
    folders = [str(run / "adapter" / name) for name in ("a-s0", "b")]
    result = CliRunner().invoke(app, ["eval", *folders, "--cost", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    costs = json.loads((tmp_path / "out" / "results.json").read_text())["costs"]
    assert costs["base"]["training"] is costs["base"]["files"] is None
    for folder, name in zip(folders, ("a-s0", "b"), strict=True):
        assert costs[name]["files"] == sum(file.stat().st_size for file in Path(folder).iterdir())
        assert costs[name]["training"]["amount"] == read_training_cost(Path(folder)).amount
    for text in (result.stdout, (tmp_path / "out" / "report.html").read_text()):
        assert "training tokens" in text
        assert "a-s0 (3), b (3); seconds and tokens are each one&#39;s own share" in text.replace("'", "&#39;")


def test_what_is_not_known_is_blank_and_said(run: Path, tmp_path: Path) -> None:
    predictor = kitout.load(run / "adapter" / "b")
    kit = predictor.kit
    kit.save("b", tmp_path / "elsewhere" / "b")
    kit.add("new", kitout.LoRA(), seed=0)
    both = kitout.Stack("b", "new")
    costs = measure_cost(kit, {"b": "b", "new": "new", "both": both}, {"b": tmp_path / "elsewhere" / "b"})
    assert costs["b"].files == folder_bytes(tmp_path / "elsewhere" / "b") > costs["b"].bytes
    assert costs["b"].row("b")[4:7] == costs["new"].row("new")[3:6] == ("", "", "")
    notes = "\n".join(cost_notes(costs))
    assert "elsewhere/b does not lie in the folder of a run" in notes
    assert "new is not known: it was not loaded from a folder" in notes
    assert "both is not known: it is made of 2 adapters" in notes


@pytest.mark.parametrize(("text", "said"), [("{", "JSONDecodeError"), ("[]", "TypeError"), (None, "not finished")])
def test_a_damaged_run_is_said(text: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run.yaml").touch()
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    found = read_training_cost(tmp_path / "adapter")
    assert said in found.unknown
    assert found.seconds is found.amount is found.memory is None
