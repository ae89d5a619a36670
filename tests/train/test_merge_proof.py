"""The proof of a merge: answers stay, the restored base is bit-identical, and a broken merge is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import kitout
from kitout import Kit
from kitout.cli import app
from kitout.errors import ConfigError
from kitout.train.measure.merge_proof import MergeProof
from tiny_models import decoder, encoder, jsonl, reviews


def run(model: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": {"name": str(model), "dtype": more.pop("dtype", "float32")}, "data": str(data),
        "train": {"batch_size": 8, "steps": 3, "lr": 1e-2}, "evaluate": {"generate_examples": 0, "prove_merge": True},
        "output": {"folder": str(out)}, **more,
    }  # fmt: skip
    kitout.train(settings, log=lambda _: None)
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(80)]
    return jsonl(tmp_path / "d.jsonl", rows)


def test_labels_and_generated_answers_are_compared(model: Path, data: Path, tmp_path: Path) -> None:
    args = ["train", "--model", str(model), "--data", str(data), "--prove-merge", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*args, "model.dtype=float32", "train.steps=3", "train.batch_size=8"])
    assert done.exit_code == 0, done.output
    (proof,) = json.loads((tmp_path / "out" / "results.json").read_text())["merge"].values()
    assert proof == {"dtype": "float32", "asked": 6 + 8, "same": 6 + 8, "restored_bit_for_bit": True}
    assert str(MergeProof(**proof)) in " ".join(done.output.split())
    assert str(MergeProof(**proof)) in (tmp_path / "out" / "report.html").read_text()


def test_classes_of_a_classifier_are_compared(data: Path, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "labels.jsonl", [dict(row) for row in reviews(60)])
    proof = run(encoder(tmp_path / "model"), rows, tmp_path / "out")["merge"]["adapter"]
    assert proof == {"dtype": "float32", "asked": 6, "same": 6, "restored_bit_for_bit": True}


def test_a_half_precision_base_is_merged_in_float32_and_nothing_else_changes(
    model: Path, data: Path, tmp_path: Path
) -> None:
    without = {"evaluate": {"generate_examples": 0}}
    runs = {}
    for name, more in (("with", {}), ("without", without)):
        results = run(model, data, tmp_path / name, dtype="bfloat16", **more)
        (weights,) = (tmp_path / name / "adapter").glob("*.safetensors")
        record = json.loads((tmp_path / name / "adapter" / "adapter.json").read_text())
        runs[name] = results, load_file(weights), record
    assert runs["with"][0]["merge"]["adapter"]["dtype"] == "float32"
    assert runs["with"][0]["merge"]["adapter"]["restored_bit_for_bit"]
    assert "merge" not in runs["without"][0]
    assert runs["with"][0]["machine"]["dtype"] == "bfloat16"
    assert runs["with"][2].get("base") == runs["without"][2].get("base")
    for key, value in runs["with"][1].items():
        assert torch.equal(value, runs["without"][1][key])


def test_a_base_that_is_not_restored_is_noticed(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmerge, merges = Kit.unmerge, []

    def broken(kit: Kit) -> None:
        unmerge(kit)
        merges.append(kit)
        if len(merges) == 2:  # the first is the check before training
            with torch.no_grad():
                next(iter(kit.base.parameters())).view(-1)[0] += 1e-3

    monkeypatch.setattr(Kit, "unmerge", broken)
    proof = run(model, data, tmp_path / "out")["merge"]["adapter"]
    assert not proof["restored_bit_for_bit"]
    assert "NOT bit-identical" in str(MergeProof(**proof))


def test_answers_that_a_merge_changes_are_counted(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, merges = Kit.merge, []

    def broken(kit: Kit, *names: str) -> None:
        merge(kit, *names)
        merges.append(names)
        if len(merges) == 2:  # the first is the check before training
            with torch.no_grad():
                kit.base.model.norm.weight.neg_()  # all logits, and with them every answer

    monkeypatch.setattr(Kit, "merge", broken)
    proof = run(model, data, tmp_path / "out")["merge"]["adapter"]
    assert proof["same"] < proof["asked"]


def test_a_method_that_does_not_merge_is_refused_before_training(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.prove_merge"):
        run(model, data, tmp_path / "out", method="PromptTuning")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
