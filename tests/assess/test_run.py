"""`kitout.assess.run` and `kitout eval`: base and adapters on the same sets, and nothing is left changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import kitout
from kitout import IA3, LoRA, Mix, PrefixTuning, Stack
from kitout.assess import run
from kitout.assess.cost import measure_cost
from kitout.cli import app
from kitout.data.encode.template_date import fix_template_date
from kitout.errors import ConfigError, UnknownAdapter
from kitout.evaluate.metrics.registry import compute_measures
from tiny_models import both, decoder, encoder, jsonl, reviews, vision
from tiny_suites import use_tiny_suites

QUESTIONS = [
    {"question": f"what is {word}?", "choices": ["good", "bad tree", "cat"], "answer": i % 3}
    for i, word in enumerate(["the cat", "a tree", "good", "awful", "today", "again"])
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("assess") / "m")


def adapted(model: Path, **methods: Any) -> Any:
    """The predictor of a base with untrained adapters that change what it says."""
    predictor = kitout.load(base=str(model))
    for number, (name, method) in enumerate(methods.items()):
        predictor.kit.add(name, method, seed=number)
        with torch.no_grad():
            for value in predictor.kit[name].parameters():
                value.add_(torch.randn_like(value), alpha=0.3)
    return predictor


def sources_of(tmp_path: Path) -> list[str]:
    rows = [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(24)]
    return [
        str(jsonl(tmp_path / "questions.jsonl", QUESTIONS)),
        str(jsonl(tmp_path / "texts.jsonl", [{"text": r["text"]} for r in reviews(10)])),
        str(jsonl(tmp_path / "instructions.jsonl", rows)),
    ]


def test_every_kind_of_source_is_measured_for_base_adapters_and_routes(model: Path, tmp_path: Path) -> None:
    predictor = adapted(model, a=LoRA(), b=IA3(), c=PrefixTuning(length=3))
    kit, routes = predictor.kit, {"a": "a", "c": "c", "both": Stack("a", "b"), "mix": Mix({"a": 0.5, "b": 0.5})}
    found = run(kit, routes, sources_of(tmp_path), tokenizer=predictor.tokenizer)
    assert [one.kind for one in found.sets] == ["choice", "text", "causal_lm"]
    assert [one.n for one in found.sets] == [6, 10, 24]
    for one, headline in zip(found.sets, ("acc", "bits_per_byte", "accuracy"), strict=True):
        assert list(one.measures) == ["base", *routes]
        assert all(next(iter(measures)) == headline for measures in one.measures.values())
    alone = run(kit, ["a"], sources_of(tmp_path), tokenizer=predictor.tokenizer, keep_base=False)
    for one, other in zip(found.sets, alone.sets, strict=True):
        for name in ("base", "a"):
            for metric, measure in other.measures[name].items():
                assert measure.value == pytest.approx(one.measures[name][metric].value, abs=1e-5)
    text = str(found)
    assert text.count("can show (80 % power)") == 3
    assert "smallest difference that 10 test examples can show (80 % power): bits per byte" in text
    plain = found.to_dict()["sets"][0]["differences"]["a"]["acc"]
    assert plain["smallest"] == found.sets[0].changes["a"][0].smallest.value > 0
    assert "acc_norm" in text or "normalized" in text
    assert json.loads(json.dumps(found.to_dict()))["sets"][1]["scores"]["a"]["bits_per_byte"]["n"] == 10


def test_nothing_is_left_changed(model: Path, tmp_path: Path) -> None:
    predictor = adapted(model, a=LoRA(dropout=0.5))
    kit = predictor.kit.train()
    kit.use("a")
    before = {name: value.clone() for name, value in kit.base.state_dict().items()}
    modes = [module.training for module in kit.modules()]
    state = torch.random.get_rng_state()
    first = run(kit, None, sources_of(tmp_path), tokenizer=predictor.tokenizer, cost=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert kit.active == "a"
    assert modes == [module.training for module in kit.modules()]
    assert all(torch.equal(value, kit.base.state_dict()[name]) for name, value in before.items())
    assert (
        run(kit, None, sources_of(tmp_path), tokenizer=predictor.tokenizer).to_dict()["sets"] == first.to_dict()["sets"]
    )
    assert first.costs["a"].merged_prefill is not None
    assert first.costs["base"].parameters == 0


def test_the_base_is_asked_once(model: Path, tmp_path: Path, cache: Path) -> None:
    predictor = adapted(model, a=LoRA())
    asked: list[Any] = []
    predictor.kit.base.register_forward_pre_hook(lambda *_: asked.append(predictor.kit.active))
    sources = sources_of(tmp_path)
    first = run(predictor.kit, ["a"], sources, tokenizer=predictor.tokenizer)
    with_base = len(asked)
    second = run(predictor.kit, ["a"], sources, tokenizer=predictor.tokenizer)
    assert len(asked) - with_base < with_base
    assert None not in asked[with_base:]
    assert first.to_dict() == second.to_dict()
    for file in (cache / "base-answers").iterdir():
        file.write_text("{broken", encoding="utf-8")
    assert run(predictor.kit, ["a"], sources, tokenizer=predictor.tokenizer).to_dict() == first.to_dict()
    with torch.no_grad():
        predictor.kit.detach().lm_head.weight[0] += 1.0
    other = kitout.attach(predictor.model).eval()
    other.add("a", LoRA(), seed=0)
    asked.clear()
    run(other, ["a"], sources[:1], tokenizer=predictor.tokenizer)
    assert None in asked, "another base has other answers"


def test_a_classifier_is_compared_with_the_majority(tmp_path: Path) -> None:
    model = encoder(tmp_path / "m")
    data = jsonl(tmp_path / "a.jsonl", reviews(60))
    kitout.train(
        {
            "model": str(model),
            "data": {"train": str(data), "test": 8, "validation": 0},
            "train": {"steps": 2, "batch_size": 4},
            "output": {"folder": str(tmp_path / "run")},
        },
        log=lambda _: None,
    )
    predictor = kitout.load(tmp_path / "run" / "adapter", base=str(model))
    found = run(
        predictor.kit, None, [str(jsonl(tmp_path / "new.jsonl", reviews(30, 3)))], tokenizer=predictor.tokenizer
    )
    (one,) = found.sets
    assert (one.kind, one.baseline) == ("classification", "majority class")
    assert one.measures["majority class"]["accuracy"].value >= 0.5
    labels = [row["label"] for row in reviews(30, 3)]
    predicted = [prediction.label for prediction in predictor([row["text"] for row in reviews(30, 3)])]
    assert (
        one.measures["adapter"]["accuracy"].value
        == compute_measures("classification", predicted, labels)["accuracy"].value
    )


def test_other_answers_than_those_of_training_are_a_closed_set_too(model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(40)]
    kitout.train(
        {
            "model": str(model),
            "data": {"train": str(jsonl(tmp_path / "a.jsonl", rows)), "test": 0, "validation": 0},
            "train": {"steps": 1, "batch_size": 4},
            "output": {"folder": str(tmp_path / "run")},
        },
        log=lambda _: None,
    )
    predictor = kitout.load(tmp_path / "run" / "adapter", base=str(model))
    assert predictor.usage.text.answers
    other = [{**row, "output": "cat" if row["output"] == "good" else "tree"} for row in rows[:20]]
    sources = [str(tmp_path / "a.jsonl"), str(jsonl(tmp_path / "b.jsonl", other))]
    found = run(predictor.kit, None, sources, tokenizer=predictor.tokenizer)
    assert ["accuracy" in one.measures["adapter"] for one in found.sets] == [True, True]


def test_faults_are_reported_together(model: Path, tmp_path: Path) -> None:
    predictor = adapted(model, a=LoRA())
    bad = jsonl(tmp_path / "bad.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 7}])
    with pytest.raises(ConfigError) as error:
        run(predictor.kit, ["a"], [str(tmp_path / "no.jsonl"), str(bad)], suite="quickk", tokenizer=predictor.tokenizer)
    assert "no.jsonl" in str(error.value)
    assert "answer 7" in str(error.value)
    assert "'quick'" in str(error.value)
    with pytest.raises(UnknownAdapter, match="'b'"):
        run(predictor.kit, ["b"], [str(bad)], tokenizer=predictor.tokenizer)
    with pytest.raises(ConfigError, match="name a source, or a suite"):
        run(predictor.kit, ["a"], tokenizer=predictor.tokenizer)


def test_adapters_with_other_answers_are_assessed_apart(model: Path, tmp_path: Path) -> None:
    predictor = adapted(model, a=LoRA(), b=LoRA(), c=LoRA())
    base = {"name": "m", "source": "folder"}
    for name, task, labels in (("a", "classification", ["x", "y"]), ("b", "classification", ["y", "x"])):
        predictor.kit[name].usage = {"task": task, "labels": labels, "base": base}
    predictor.kit["c"].usage = {"task": "causal_lm", "base": base}
    with pytest.raises(ConfigError) as error:
        run(predictor.kit, None, sources_of(tmp_path), tokenizer=predictor.tokenizer)
    assert "'b' and 'a' have other labels: assess them apart" in str(error.value)
    assert "'c' is for causal_lm, 'a' for classification" in str(error.value)
    assert len(run(predictor.kit, ["c"], sources_of(tmp_path), tokenizer=predictor.tokenizer).sets) == 3


def test_adapters_that_were_trained_on_other_prompts_are_assessed_apart(model: Path, tmp_path: Path) -> None:
    predictor = adapted(model, a=LoRA(), b=LoRA(), c=LoRA())
    kit, base = predictor.kit, {"name": "m", "source": "folder"}
    for name, own in {"a": {}, "b": {"system_prompt": "awful again"}, "c": {"max_length": 900}}.items():
        text = {"tokenizer": "t", "max_length": 1000, **own}
        kit[name].usage = {"task": "causal_lm", "base": base, "text": text}
    sources = sources_of(tmp_path)
    with pytest.raises(ConfigError, match=r"'b' was trained with other settings than .* \(system_prompt\): assess"):
        run(kit, ["a", "b"], sources, tokenizer=predictor.tokenizer)
    with pytest.raises(ConfigError, match="apart, or write system_prompt of the source for all"):
        run(kit, {"both": Stack("a", "b")}, sources, tokenizer=predictor.tokenizer)
    assert len(run(kit, ["a", "b"], sources[:2], tokenizer=predictor.tokenizer).sets) == 2
    assert len(run(kit, ["a", "c"], sources, tokenizer=predictor.tokenizer).sets) == 3  # no example is so long
    given = {"path": sources[2], "system_prompt": "good"}
    assert len(run(kit, ["a", "b"], [given], tokenizer=predictor.tokenizer).sets) == 1
    assert len(run(kit, {"both": Stack("a", "b")}, [given], tokenizer=predictor.tokenizer).sets) == 1


def test_the_same_source_is_measured_once(model: Path, tmp_path: Path) -> None:
    predictor, lines = adapted(model), []
    source = sources_of(tmp_path)[1]
    found = run(predictor.kit, None, [source, source], tokenizer=predictor.tokenizer, log=lines.append)
    assert len(found.sets) == 1
    assert any("measured once" in line for line in lines)


def test_a_suite_gives_a_line_of_forgetting(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_suites(tmp_path / "sets", monkeypatch)
    predictor = adapted(model, a=LoRA(), b=IA3())
    progress: list[tuple[str, int, int]] = []
    found = run(
        predictor.kit, None, suite="quick", tokenizer=predictor.tokenizer, on_progress=lambda *a: progress.append(a)
    )
    assert list(found.forgetting) == ["a", "b"]
    assert [one.name for one in found.forgetting["a"]] == [one.name for one in found.suite_sets]
    assert "forgetting of b, quick suite" in str(found)
    assert "smallest shown" in str(found)
    assert found.to_dict()["forgetting"]["a"]["sets"]["wiki"]["smallest"] > 0
    assert found.to_dict()["forgetting"]["a"]["sets"]["wiki"]["kl"] > 0
    assert {(done <= total, total) for name, done, total in progress if name == "wiki"} == {(True, 3)}
    alone = run(predictor.kit, [], suite="quick", tokenizer=predictor.tokenizer)
    assert [part.title for part in alone.sections()] == [one.title for one in found.suite_sets]
    assert "wiki: text, 3 examples" in str(alone)
    assert "wiki: text, 3 examples" in alone.to_html()
    t5 = kitout.load(base=str(both(tmp_path / "t5")))
    with pytest.raises(ConfigError, match="and this is none"):
        run(t5.kit, None, suite="quick", tokenizer=t5.tokenizer)


def test_an_adapter_that_gives_no_numbers_is_told_and_hides_nothing_of_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiny_suites(tmp_path / "sets", monkeypatch)
    predictor = adapted(model, a=LoRA(), b=LoRA())
    with torch.no_grad():
        for value in predictor.kit["b"].parameters():
            value.fill_(float("nan"))
    found = run(predictor.kit, None, sources_of(tmp_path), suite="quick", tokenizer=predictor.tokenizer)
    assert found.sets[0].measures["b"]["acc"].value == 0
    assert "nan" not in json.dumps(found.to_dict(), allow_nan=False).lower()
    words = {name: {one.name: one.verdict for one in own} for name, own in found.forgetting.items()}
    assert words["b"]["wiki"] == "not finite"
    assert "not finite on wiki" in str(found)
    alone = run(predictor.kit, ["a"], suite="quick", tokenizer=predictor.tokenizer)
    assert words["a"] == {one.name: one.verdict for one in alone.forgetting["a"]}


@pytest.mark.parametrize("build", [both, encoder, vision])
def test_the_cost_of_any_model_is_measured(build: Any, tmp_path: Path) -> None:
    model = build(tmp_path / "m")
    task = {both: "seq2seq_lm", encoder: "classification", vision: "image_classification"}[build]
    kit = kitout.load(base=str(model), task=task).kit
    kit.add("a", LoRA(), seed=0)
    found = measure_cost(kit, {"a": "a"})
    assert list(found) == ["base", "a"]
    assert found["a"].prefill is not None
    assert found["a"].merged_prefill is not None
    assert (found["a"].decoding is None) == (build is not both)
    assert found["a"].unit == ("image" if build is vision else "token")
    assert f"prefill ms/{found['a'].unit}" in found["base"].head()


def test_the_verb_writes_what_it_prints(model: Path, tmp_path: Path) -> None:
    predictor = adapted(model, a=LoRA(), b=IA3())
    for name in "ab":
        predictor.kit.save(name, tmp_path / name)
    sources = sources_of(tmp_path)
    command = ["eval", str(tmp_path / "a"), str(tmp_path / "b"), "--model", str(model), "--data", sources[0]]
    command += ["--data", sources[1], "--limit", "5", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "--task" in result.output
    result = CliRunner().invoke(app, [*command, "--task", "causal_lm", "--cost"])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [one["n"] for one in written["sets"]] == [5, 5]
    assert set(written["costs"]) == {"base", "a", "b"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "a, b against the base" in page
    assert page.count("<table") == 3
    assert "@media print" in page
    assert 'src="http' not in page
    assert "<script" not in page
    assert (tmp_path / "out" / "results.txt").read_text(encoding="utf-8").strip() in result.stdout
    result = CliRunner().invoke(app, ["eval", "--model", str(model), "--data", sources[0], "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sets"][0]["scores"]["base"]["acc"]["n"] == 6
    for folder, message in ((sources[1], "is a file"), (f"{sources[1]}/below", "cannot be made")):
        wrong = CliRunner().invoke(app, ["eval", str(tmp_path / "a"), "--data", sources[0], "--out", folder])
        assert wrong.exit_code == 1
        assert message in " ".join(wrong.output.split())
        assert "loading the base" not in wrong.output
    assert CliRunner().invoke(app, ["eval"]).exit_code == 1


def test_a_kit_alone_is_asked_on_the_day_of_its_training(tmp_path: Path) -> None:
    """Without a Predictor too: the chat template prints the day, and prompts were of another one than in training."""
    tokenizer = AutoTokenizer.from_pretrained(decoder(tmp_path / "m"))
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(8)]
    source = str(jsonl(tmp_path / "x.jsonl", rows))
    predictor = adapted(tmp_path / "m", a=LoRA())
    usage = predictor.usages[""]
    text = usage.text.model_copy(update={"template_date": "1999-01-01"})
    predictor.kit["a"].usage = usage.model_copy(update={"text": text}).model_dump()
    fix_template_date(tokenizer, "1999-01-01")
    lines: list[str] = []
    run(predictor.kit, ["a"], [source], tokenizer=tokenizer, keep_in=tmp_path / "answers")
    run(predictor.kit, ["a"], [source], keep_in=tmp_path / "answers", log=lines.append)
    assert any("answers of a are taken from" in line for line in lines), lines
