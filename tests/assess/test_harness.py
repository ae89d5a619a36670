"""Tasks of lm_eval run on base and adapters offline, and a file's own code only where that is allowed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kitout
from kitout import IA3, LoRA, PromptTuning
from kitout.assess import run
from kitout.assess.harness import _outcome, read_tasks
from kitout.cli import app
from kitout.errors import ConfigError
from tiny_models import decoder, jsonl

ROWS = [
    {"question": f"is it {i}?", "choices": ["the cat", "a dog", "today"][: 2 + i % 2], "answer": i % 2}
    for i in range(8)
]
TASK = {
    "task": "mine", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def write(tmp_path: Path, text: str = "", name: str = "task.yaml", **changes: Any) -> Path:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in {**TASK, **changes}.items())
    (tmp_path / name).write_text(lines + text, encoding="utf-8")
    return tmp_path / name


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"need lm_eval, not installed here\n.*harness"):
        read_tasks([write(tmp_path)], False)
    assert read_tasks([], False) == []


def test_tasks_give_what_our_own_sets_give(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    predictor = kitout.load(base=str(decoder(tmp_path / "m")), dtype="float32")
    kit = predictor.kit
    for number, (name, method) in enumerate({"a": LoRA(), "b": IA3(), "p": PromptTuning(length=3)}.items()):
        kit.add(name, method, seed=number)
        with torch.no_grad():
            for value in kit[name].parameters():
                value.add_(torch.randn_like(value), alpha=0.5)
    kit.use("b")
    texts = jsonl(tmp_path / "t.jsonl", [{"text": f"the cat {i} today"} for i in range(5)])
    rolling = {
        "task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "dataset_kwargs": {"data_files": {"test": str(texts)}},
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    tasks = [write(tmp_path), write(tmp_path, "", "texts.yaml", **{"doc_to_choice": None, **rolling})]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = run(
        kit,
        None,
        [str(tmp_path / "rows.jsonl"), str(tmp_path / "t.jsonl")],
        harness=tasks,
        tokenizer=predictor.tokenizer,
    )
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert kit.active == "b"
    for own, theirs in zip(found.sets, found.harness, strict=True):
        assert theirs.n == own.n
        for name in ("base", "a", "b", "p"):
            for metric in theirs.measures[name]:
                assert own.measures[name][metric].value == pytest.approx(theirs.measures[name][metric].value, rel=1e-4)
                assert theirs.reported[name][f"{metric},none"] == pytest.approx(theirs.measures[name][metric].value)
    assert list(found.harness[0].measures["a"]) == ["acc", "acc_norm"]
    plain = json.loads(json.dumps(found.to_dict()))["harness"]
    assert [one["name"] for one in plain] == ["mine", "texts"]
    assert "mine: lm_eval, 8 examples" in str(found)


def test_of_sums_and_of_values_beyond_one() -> None:
    """No fraction of one model is none of another, and sums over units are a ratio."""

    def result(factor: float) -> dict[str, Any]:
        values = [factor * i for i in range(4)]
        samples = [
            {"doc_id": i, "filter": "none", "metrics": ["mine", "byte_perplexity"], "mine": value,
             "byte_perplexity": (-value - i, 3 + i)}
            for i, value in enumerate(values)
        ]  # fmt: skip
        means = {"mine,none": sum(values) / 4, "byte_perplexity,none": 1.0}
        return {"samples": {"t": samples}, "results": {"t": means}, "higher_is_better": {"t": {}}}

    found = _outcome("t", {"base": result(0.0), "a": result(20.0)}, 0)
    change, perplexity = found.changes["a"]
    assert [one["mine"].is_fraction for one in found.measures.values()] == [False, False]
    assert change.verdict.startswith("no significant difference (")
    assert "points" not in change.verdict
    assert perplexity.tuned.value == pytest.approx(np.exp((120 + 6) / (3 + 4 + 5 + 6)))
    assert found.measures["a"]["byte_perplexity"].ratio is not None


def test_a_perplexity_of_answers_is_compared_by_example() -> None:
    """lm_eval's `perplexity` is exp of the mean of -sum log p; one model's values may be no numbers."""

    def result(*values: float) -> dict[str, Any]:
        samples = [
            {"doc_id": i, "filter": "none", "metrics": ["perplexity"], "perplexity": value}
            for i, value in enumerate(values)
        ]
        total = {"perplexity,none": float(np.exp(-np.mean(values)))}
        return {"samples": {"t": samples}, "results": {"t": total}, "higher_is_better": {"t": {"perplexity": False}}}

    base = [-2.5, -3.5] * 10
    worse = [value - 0.5 - 0.01 * i for i, value in enumerate(base)]
    found = _outcome("t", {"base": result(*base), "a": result(*worse), "b": result(*20 * [np.nan])}, 0)
    (change,), (diverged,) = found.changes["a"], found.changes["b"]
    assert change.base.value == pytest.approx(np.exp(3))
    assert change.verdict.startswith("worse")
    assert "not finite" in diverged.verdict


def test_a_mean_of_perplexities_is_not_taken_for_sums_of_log_p() -> None:
    samples = [
        {"doc_id": i, "filter": "none", "metrics": ["perplexity"], "perplexity": value}
        for i, value in ((0, 8.0), (1, 12.0))
    ]
    result = {
        "samples": {"t": samples}, "results": {"t": {"perplexity,none": 10.0}},
        "higher_is_better": {"t": {"perplexity": False}},
    }  # fmt: skip
    found = _outcome("t", {"base": result}, 0)
    assert found.measures["base"]["perplexity"].value == 10.0


def test_code_of_a_file_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef f(docs): return docs\n")
    (tmp_path / "hidden.yaml").write_text("process_docs: !function evil.f\n")
    files = [
        write(tmp_path, "process_docs: !function evil.f\n", "a.yaml"),
        write(tmp_path, "include: hidden.yaml\n", "b.yaml"),
        write(tmp_path, "x: !!python/object/apply:os.system ['true']\n", "c.yaml"),
        write(tmp_path, name="d.yaml", metric_list=[{"metric": "./evil.py"}]),
        write(tmp_path, name="e.yaml", dataset_path="evil.py"),
    ]
    for file in files:
        with pytest.raises(ConfigError, match="allow-code"):
            read_tasks([file], False)
    assert not (tmp_path / "ran").exists()
    (config,) = read_tasks(files[:1], True)
    assert config["process_docs"]([1]) == [1]
    assert (tmp_path / "ran").exists()


def test_templates_see_no_more_than_their_row(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    predictor = kitout.load(base=str(decoder(tmp_path / "m")), dtype="float32")
    file = write(tmp_path, doc_to_text="{{ question.__class__.__mro__[1].__subclasses__() | length }}")
    with pytest.raises(Exception, match=r"unsafe|undefined|access"):
        run(predictor.kit, None, harness=[file], tokenizer=predictor.tokenizer)
    assert run(predictor.kit, None, harness=[file], allow_code=True, tokenizer=predictor.tokenizer).harness


def test_all_wrong_tasks_are_named_with_the_other_faults(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed")
    predictor = kitout.load(base=str(decoder(tmp_path / "m")), dtype="float32")
    good = write(tmp_path)
    (tmp_path / "group.yaml").write_text("group: g\ntask: [a, b]\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    wrong = [tmp_path / "group.yaml", tmp_path / "broken.yaml", tmp_path / "no.yaml", good, good]
    with pytest.raises(ConfigError) as error:
        run(
            predictor.kit,
            None,
            [str(tmp_path / "none.jsonl")],
            suite="quik",
            harness=wrong,
            tokenizer=predictor.tokenizer,
        )
    for part in (
        "no task with a name",
        "broken.yaml",
        "there is no file",
        "two tasks are called 'mine'",
        "none.jsonl",
        "'quick'",
    ):
        assert part in str(error.value)
    result = CliRunner().invoke(app, ["eval", "--model", str(tmp_path / "m"), "--harness", str(good), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout[result.stdout.index("{\n") :])["harness"][0]["scores"]["base"]["acc"]["n"] == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "none.jsonl"),
        ({"test_split": "tets"}, "tets"),
        ({"doc_to_text": "{{questoin}}"}, "questoin"),
        ({"output_type": "multiple_chioce"}, "multiple_chioce"),
        ({"doc_to_text": "{{ question"}, "unexpected end"),
        ({"doc_to_target": "{{ answer if answer == 0 else anwser }}"}, "anwser"),  # not of the first row
    ],
)
def test_a_task_that_asks_nothing_is_said_before_anything_is_measured(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(ConfigError, match=said):
        read_tasks([write(tmp_path, **changes)], False)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
