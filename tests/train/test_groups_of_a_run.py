"""`data.group` of a run: whole groups in one split, every interval and verdict by groups, also in `kitout compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kitout
from kitout.compare import compare_runs
from kitout.errors import ConfigError, DataError
from kitout.evaluate.example_scores import load_scores
from kitout.evaluate.metrics.measure import score_difference
from kitout.train.config.load import load
from kitout.train.measure.evaluate import evaluate_jobs
from kitout.train.setup.prepare import prepare
from tiny_models import decoder, encoder, jsonl, reviews, vision

pytest.importorskip("accelerate")


def grouped(rows: list[dict[str, Any]], size: int = 4) -> list[dict[str, Any]]:
    return [row | {"passage": f"p{i // size}"} for i, row in enumerate(rows)]


def config_of(root: Path, model: Path, rows: list[dict[str, Any]], **data: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(jsonl(root / "d.jsonl", rows)), "test": 24, "validation": 0, "group": "passage"} | data,
        "train": {"batch_size": 4, "steps": 2, "lr": 3e-2},
        "output": {"folder": str(root / "run")},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("groups")
    config = config_of(root, encoder(root / "model"), grouped(reviews(72)))
    config["train"]["seeds"] = [0, 1, 2]
    config["jobs"] = [{"name": "lora", "method": {"name": "LoRA", "rank": 2}}, {"name": "ia3", "method": "IA3"}]
    kitout.train(config, log=lambda _: None)
    return root / "run"


def test_results_say_groups_and_scores_keep_them(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    change = results["comparisons"]["lora-s0"][0]
    scores = load_scores(finished / "scores.safetensors")
    one = scores["lora-s0"]
    groups = one.tuned["accuracy"].groups
    assert groups is not None
    assert change["tuned"]["num_groups"] == change["base"]["num_groups"] == groups.max() + 1 == 6
    assert set(np.bincount(groups)) == {4}, "whole passages"
    difference = score_difference(one.base["accuracy"].measure, one.tuned["accuracy"].measure)
    assert difference == pytest.approx((change["difference"], change["low"], change["high"]), abs=1e-12)
    again = one.tuned["accuracy"].measure.score()
    assert (again.low, again.high) == (change["tuned"]["low"], change["tuned"]["high"])
    report = (finished / "report.html").read_text()
    assert "24 test examples in 6 groups" in report
    assert "24 test examples in 6 groups" in (finished / "adapter" / "lora-s0" / "README.md").read_text()
    assert "in groups of one passage" in report


def test_verdicts_over_seeds_are_by_groups(finished: Path) -> None:
    ranking = json.loads((finished / "results.json").read_text())["seeds"]["metrics"][0]["ranking"]
    assert ranking["pairs"][0]["num_groups"] == 6
    (found,) = [one for one in compare_runs([finished]).rankings if one.metric == "accuracy"]
    assert found.ranking is not None
    assert found.ranking.pairs[0].example_error == pytest.approx(ranking["pairs"][0]["example_error"], rel=1e-12)
    assert found.ranking.pairs[0].num_groups == 6
    assert "24 test examples in 6 groups" in found.caption


def test_generated_answers_and_tags_have_groups(tmp_path: Path) -> None:
    words = [{"tokens": r["text"].split(), "tags": ["B-X"] + ["O"] * (len(r["text"].split()) - 1)} for r in reviews(40)]
    chats = [
        {"instruction": "what is it?", "input": r["text"], "output": f"{r['label']} {i % 7} today"}
        for i, r in enumerate(reviews(40))
    ]
    for name, build, rows in (("tags", encoder, words), ("chats", decoder, chats)):
        root = tmp_path / name
        root.mkdir()
        config = load(config_of(root, build(root / "m"), grouped(rows), test=12) | {"evaluate": {"max_new_tokens": 2}})
        run = prepare(config)
        (outcome,) = evaluate_jobs(run, config.evaluate).values()
        assert len({measure.n for measure in outcome.measures.values()}) == 1
        assert {measure.num_groups for measure in outcome.measures.values()} == {3}
        assert {measure.num_groups for measure in outcome.base_measures.values()} == {3}
        run.kit.detach()


def test_what_has_no_groups_is_refused(tmp_path: Path) -> None:
    model = encoder(tmp_path / "m")
    with pytest.raises(DataError, match=r"columns: text, label, passage\): there is no column 'page'"):
        kitout.train(config_of(tmp_path, model, grouped(reviews(40)), group="page"), log=lambda _: None)
    with pytest.raises(ConfigError, match=r"data\.group=passage keeps groups in one split, which a stream cannot"):
        kitout.train(config_of(tmp_path, model, grouped(reviews(40)), streaming=True), log=lambda _: None)
    images = config_of(tmp_path, vision(tmp_path / "v"), grouped(reviews(40)))
    with pytest.raises(ConfigError, match="images are not read in groups"):
        kitout.train(images, log=lambda _: None)
    one = config_of(tmp_path, model, grouped(reviews(40)), test=4)
    with pytest.raises(ConfigError, match=r"adapter: the 4 test examples are of one group \('p\d+'\)"):
        kitout.train(one, log=lambda _: None)
