"""Runs with train.seeds: each seed comes out as alone; means, verdicts and scores are kept; a kill changes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kitout
from kitout.compare import compare_runs
from kitout.evaluate.example_scores import load_scores
from kitout.evaluate.metrics.measure import score_difference
from tiny_models import decoder, encoder, jsonl, reviews
from train import subprocess_runs as runs
from train.other_processes import run_in_processes, start_process
from train.test_kills import names, results

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("seeds")
    return {
        "model": {"name": str(encoder(root / "model")), "dtype": "float32"},
        "data": {"train": str(jsonl(root / "d.jsonl", reviews(60))), "test": 24, "validation": 0},
        "train": {"batch_size": 4, "steps": 6, "lr": 3e-2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder, lines = tmp_path_factory.mktemp("seeds") / "run", []
    jobs = [{"name": "lora", "method": {"name": "LoRA", "rank": 2}}, {"name": "ia3", "method": "IA3"}]
    train = config["train"] | {"seeds": [0, 1, 2]}
    kitout.train(config | {"train": train, "jobs": jobs, "output": {"folder": str(folder)}}, log=lines.append)
    return folder, "\n".join(lines)


def test_each_seed_comes_out_as_it_does_alone(
    config: dict[str, Any], finished: tuple[Path, str], tmp_path: Path
) -> None:
    alone = config | {"train": config["train"] | {"seed": 2}, "output": {"folder": str(tmp_path / "alone")}}
    kitout.train(alone | {"method": "IA3"}, log=lambda _: None)
    ours = load_file(finished[0] / "adapter" / "ia3-s2" / "adapter.safetensors")
    theirs = load_file(tmp_path / "alone" / "adapter" / "adapter.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)
    other = load_file(finished[0] / "adapter" / "ia3-s1" / "adapter.safetensors")
    assert any(not torch.allclose(other[key], ours[key], atol=1e-3) for key in ours)


def test_results_pages_and_terminal_have_means_and_verdicts(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    seeds = json.loads((folder / "results.json").read_text())["seeds"]
    assert seeds["adapters"]["lora"] == {"lora-s0": 0, "lora-s1": 1, "lora-s2": 2}
    headline = seeds["metrics"][0]
    assert headline["metric"] == "accuracy"
    lora = headline["methods"][0]
    assert lora["mean"] == pytest.approx(sum(one["value"] for one in lora["seeds"]) / 3)
    assert {"difference", "low", "high"} <= lora["seeds"][0].keys()
    assert len(headline["ranking"]["letters"][0]) >= 1
    assert headline["ranking"]["pairs"][0]["num_seeds"] == [3, 3]
    assert seeds["text"] in printed
    assert "Holm over 1 pair" in printed
    assert "repeat them with other seeds" not in printed
    report = (folder / "report.html").read_text()
    assert "Over seeds, on the test split" in report
    card = (folder / "adapter" / "lora-s1" / "README.md").read_text()
    assert "This adapter is one seed of lora." in card
    assert "ia3" in card.partition("## Over seeds")[2]


def test_every_number_can_be_had_again_from_the_scores(finished: tuple[Path, str]) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    scores = load_scores(finished[0] / "scores.safetensors")
    assert scores.keys() == results["comparisons"].keys()
    for name, changes in results["comparisons"].items():
        assert scores[name].test_data == results["test_data"][name]
        for change in changes:
            tuned = scores[name].tuned.get(change["name"])
            if tuned is None or tuned.is_linearized:
                continue
            base = scores[name].base[change["name"]]
            found = score_difference(base.measure, tuned.measure)
            assert found == pytest.approx([change[key] for key in ("difference", "low", "high")], abs=1e-9)
    assert "accuracy" in scores["ia3-s0"].tuned


def test_compare_sees_two_methods(finished: tuple[Path, str]) -> None:
    table = compare_runs([finished[0]])
    assert [(row.label, row.seeds) for row in table.rows] == [("run/lora", (0, 1, 2)), ("run/ia3", (0, 1, 2))]
    headline = json.loads((finished[0] / "results.json").read_text())["seeds"]["metrics"][0]
    ranking = table.to_dict()["rankings"][0]
    assert ranking["letters"] == headline["ranking"]["letters"]
    assert [pair["p_value"] for pair in ranking["pairs"]] == [pair["p_value"] for pair in headline["ranking"]["pairs"]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_killed_run_with_seeds_ends_as_if_it_never_was(tmp_path: Path) -> None:
    rows = [{"prompt": f"{r['text']}:", "completion": f" {r['label']}"} for r in reviews(40)]
    config = {
        "model": {"name": str(decoder(tmp_path / "model")), "dtype": "float32"},
        "data": str(jsonl(tmp_path / "d.jsonl", rows)),
        "jobs": [{"name": "plain"}, {"name": "drop", "method": {"name": "LoRA", "dropout": 0.1}}],
        "train": {"batch_size": 4, "steps": 4, "save_steps": 1, "lr": 1e-2, "seeds": [0, 1], "keep_checkpoints": 1},
        "evaluate": {"steps": 2, "generate_examples": 2}, "output": {"folder": str(tmp_path / "whole")},
    }  # fmt: skip
    (num_operations,) = run_in_processes(runs.train_until_killed, config, 0)
    out, whole = tmp_path / "killed", tmp_path / "whole"
    config["output"] = {"folder": str(out)}
    for at_operation in (num_operations // 4, 0):
        process, _ = start_process(runs.train_until_killed, config, at_operation)
        process.join(120)
        assert process.exitcode == (-9 if at_operation else 0)
    assert results(out) == results(whole)
    ours, theirs = (json.loads((folder / "results.json").read_text())["seeds"] for folder in (out, whole))
    assert ours == theirs
    assert (out / "scores.safetensors").read_bytes() == (whole / "scores.safetensors").read_bytes()
    files = sorted(path.relative_to(whole) for path in whole.rglob("adapter.safetensors"))
    assert len(files) == 4
    for file in files:
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    assert names(out) == names(whole)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(config: dict[str, Any], tmp_path: Path) -> None:
    jobs = [{"name": "lora", "method": {"name": "LoRA", "rank": 2}}, {"name": "ia3", "method": "IA3"}]
    model = config["model"] | {"device": "cpu"}
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        own = config | {"model": model, "jobs": jobs, "output": {"folder": str(folder)}}
        own["train"] = config["train"] | {"seeds": [0, 1, 2]}
        sizes = run_in_processes(runs.train_whole, own, processes=processes)
        assert sizes == [processes] * processes
        found[processes] = json.loads((folder / "results.json").read_text()), load_scores(folder / "scores.safetensors")
    (one, scores), (two, other_scores) = found[1], found[2]
    assert one["seeds"]["adapters"] == two["seeds"]["adapters"]
    for a, b in zip(one["seeds"]["metrics"], two["seeds"]["metrics"], strict=True):
        assert a["metric"] == b["metric"]
        for method, other in zip(a["methods"], b["methods"], strict=True):
            assert method["mean"] == pytest.approx(other["mean"], rel=1e-4)
            assert [s["value"] for s in method["seeds"]] == pytest.approx(
                [s["value"] for s in other["seeds"]], rel=1e-4
            )
        assert a["ranking"] is None or a["ranking"]["letters"] == b["ranking"]["letters"]
    assert one["tokens"] == two["tokens"]
    assert one["test_data"] == two["test_data"]
    assert scores.keys() == other_scores.keys()
    for name, own_scores in scores.items():
        for metric, values in own_scores.tuned.items():
            assert other_scores[name].tuned[metric].per_example == pytest.approx(values.per_example, rel=1e-3, abs=1e-4)
        ours, theirs = (load_file(tmp_path / n / "adapter" / name / "adapter.safetensors") for n in ("1", "2"))
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=1e-5)
