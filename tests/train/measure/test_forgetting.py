"""`evaluate.forgetting` of a run: in results.json, card and report, once, and refused before anything is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import kitout
from kitout.compare import compare_runs
from kitout.errors import AssetError, ConfigError
from kitout.evaluate.sets import suites
from kitout.evaluate.sets.choice_set import ChoiceSet
from tiny_models import decoder, encoder, jsonl, reviews
from tiny_suites import use_tiny_suites


def config(tmp_path: Path, model: Path, **data: Any) -> dict[str, Any]:
    rows = [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(40)]
    file = jsonl(tmp_path / "rows.jsonl", rows if not data else reviews(40))
    return {
        "model": str(model),
        "data": {"train": str(file), "test": 8, "validation": 0},
        "train": {"steps": 3, "batch_size": 4},
        "evaluate": {"forgetting": "quick"},
        "output": {"folder": str(tmp_path / "run")},
    }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_run_tells_what_its_adapter_forgot_and_tells_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiny_suites(tmp_path / "sets", monkeypatch)
    settings, lines = config(tmp_path, decoder(tmp_path / "m")), []
    kitout.train(settings, log=lines.append)
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    (forgotten,) = results["forgetting"].values()
    assert list(forgotten["sets"]) == [*suites.CHOICES, "wiki", "chat prompts (chat template)"]
    assert forgotten["sets"]["wiki"]["kl"] > 0
    for page in (run / "adapter" / "README.md", run / "report.html"):
        text = page.read_text(encoding="utf-8")
        assert "forgetting" in text.lower(), page
        assert forgotten["summary"][1:] in text, page
    assert any("evaluating wiki: 0 of 3 examples" in line for line in lines)
    assert any("measuring forgetting on obqa, 4 examples" in line for line in lines)
    monkeypatch.setattr(suites, "fetch_asset", None)  # a finished run asks nothing
    again: list[str] = []
    kitout.train(settings, log=again.append)
    assert any(f"forgetting: {forgotten['summary']}" in str(line) for line in again)


@pytest.mark.slow
def test_every_seed_has_its_forgetting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_suites(tmp_path / "sets", monkeypatch)
    settings = config(tmp_path, decoder(tmp_path / "m"))
    settings["train"] |= {"seeds": [0, 1, 2], "lr": 0.03}
    settings["jobs"] = [{"name": "lora"}, {"name": "ia3", "method": "IA3"}]
    asked: list[Any] = []
    ask = ChoiceSet.ask
    monkeypatch.setattr(ChoiceSet, "ask", lambda self, a, routes, p: (asked.append(routes), ask(self, a, routes, p))[1])
    kitout.train(settings, log=lambda _: None)
    run, names = tmp_path / "run", [f"{job}-s{seed}" for job in ("lora", "ia3") for seed in (0, 1, 2)]
    # the tiny sets have the same rows, so the base's answers to the first serve all
    assert asked == [[None], *[names] * len(suites.CHOICES)], "the base once, the adapters together"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert list(results["forgetting"]) == names
    assert len({json.dumps(one["sets"]["wiki"]) for one in results["forgetting"].values()}) == 6, "each its own"
    assert results["seeds"]["adapters"]["lora"] == {"lora-s0": 0, "lora-s1": 1, "lora-s2": 2}
    for name in names:
        card = (run / "adapter" / name / "README.md").read_text(encoding="utf-8")
        assert "## Forgetting" in card
        assert results["forgetting"][name]["summary"] in card
        assert f"This adapter is one seed of {name[:-3]}." in card
    table = compare_runs([run])
    for row in table.rows:
        lost = [one.forgetting for one in row.runs]
        assert len(lost) == 3
        assert None not in lost
    (alone,) = [row for row in table.rows if row.label == "run/lora"]
    own = results["forgetting"]["lora-s1"]["sets"]
    expected = -sum(own[name]["difference"] for name in suites.CHOICES) / len(suites.CHOICES)
    assert alone.runs[1].forgetting == pytest.approx(expected)


def test_what_cannot_be_measured_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_suites(tmp_path / "sets", monkeypatch)
    settings = config(tmp_path, encoder(tmp_path / "e"), labels=True)
    with pytest.raises(ConfigError, match=r"asks a language model .* objective=classification: leave it out"):
        kitout.train(settings, log=lambda _: None)

    def offline(name: str, log: object) -> Path:
        raise AssetError(f"{name} could not be downloaded")

    monkeypatch.setattr(suites, "fetch_asset", offline)
    settings = config(tmp_path, decoder(tmp_path / "m")) | {"output": {"folder": str(tmp_path / "other")}}
    with pytest.raises(AssetError, match="obqa"):
        kitout.train(settings, log=lambda _: None)
    assert not (tmp_path / "other" / "adapter").exists()


def test_a_choice_longer_than_the_model_reads_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiny_suites(tmp_path / "sets", monkeypatch)
    rows = [{"question": "q?", "choices": ["the cat " * (300 + i), "a dog"], "answer": 0} for i in range(8)]
    jsonl(tmp_path / "sets" / "piqa" / "train.jsonl", rows)
    settings = config(tmp_path, decoder(tmp_path / "m"))
    with pytest.raises(ConfigError, match=r"evaluate.forgetting=quick: 2 errors") as found:
        kitout.train(settings, log=lambda _: None)
    assert "piqa: choices: 8 errors" in str(found.value)
    assert re.search(r"question 0 has a choice of [\d,]+ tokens, and the model reads 256", str(found.value))
    assert "and 3 more questions" in str(found.value)
    assert str(found.value).endswith("leave it out; kitout eval asks the adapter sets of your own later")
    assert not (tmp_path / "run" / "adapter").exists()
    pairs = [{"prompt": f"good or bad? {i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
    data = {"train": str(jsonl(tmp_path / "pairs.jsonl", pairs)), "test": 4, "validation": 0}
    with pytest.raises(ConfigError, match="and 3 more questions"):
        kitout.align(
            stage="dpo", output=str(tmp_path / "dpo"), data=data, log=lambda _: None,
            **{name: settings[name] for name in ("model", "train", "evaluate")},
        )  # fmt: skip
