"""Goals and budgets of a search on tiny models: forgetting, latency, several objectives, ranges, earlier runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kitout
from kitout.search import runner
from kitout.search.advise import MIN_RUNS
from kitout.search.population import forgetting
from kitout.search.population.proposals import propose
from kitout.train.measure.run_history import HISTORY_FILE, append_rows, read_rows
from search.pages.made_up import population
from search.searches import loaded, tiny_plan
from search.test_advise import DESIGN, ROW
from tiny_models import decoder, jsonl, reviews
from tiny_suites import use_tiny_suites

pytest.importorskip("optuna")
pytest.importorskip("accelerate")
SHORT: dict[str, Any] = {"candidates": 4, "halving": {"factor": 4, "first": 0.25}, "confirm": {"designs": 1}}


def search(root: Path, **sections: Any) -> dict[str, Any]:
    """What search.json holds of a short one."""
    return dict(kitout.search.run(tiny_plan(root, **{**SHORT, **sections}), log=lambda _line: None).figures)


def test_a_search_begins_from_earlier_runs_and_leaves_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Designs of the nearest runs come behind the sites' ranking; what the search confirms is in the history after."""
    monkeypatch.setenv("KITOUT_RUNS", str(tmp_path / "history"))
    file = tmp_path / "history" / HISTORY_FILE
    near = replace(ROW, model_kind="bert", depth=2, width=48, parameters=70_000, examples=50)
    earlier = json.dumps({**DESIGN, "settings": {"rank": 3}, "lr": 0.0017})
    append_rows(file, [replace(near, run=str(i), design=earlier) for i in range(MIN_RUNS)])
    figures = search(tmp_path, warm=True)
    of_history = [one for one in figures["designs"] if one["origin"] == "an earlier run"]
    assert [(one["method"], one["lr"]) for one in of_history] == [({"name": "LoRA", "rank": 3}, 0.0017)]
    left = read_rows(file)[MIN_RUNS:]
    assert {row.source for row in left} == {"search"}
    assert len(left) == 3 * len(figures["confirmation"]["designs"])
    cold = search(tmp_path, out=str(tmp_path / "cold"))
    assert "an earlier run" not in {one["origin"] for one in cold["designs"]}


def test_no_slow_design_is_trained_but_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(_kit: object, routes: dict[str, str]) -> dict[str, float]:
        return {name: 2.0 if name.startswith("lora") else 1.05 for name in routes}

    monkeypatch.setattr(runner, "measure_prefill", timed)
    figures = search(tmp_path, budget={"max_latency": 1.1})
    trained = {one["name"] for one in figures["rungs"][0]["decisions"]}
    assert trained
    assert not any(name.startswith("lora") for name in trained)
    assert {name for name in figures["latency"] if name.startswith("lora")} == {"lora-01", "lora-02"}
    monkeypatch.setattr(
        runner, "measure_prefill", lambda _kit, routes: {name: 3.0 - 0.1 * i for i, name in enumerate(routes)}
    )
    all_slow = search(tmp_path, budget={"max_latency": 1.1}, out=str(tmp_path / "slow"))
    assert [one["name"] for one in all_slow["rungs"][0]["decisions"]] == [list(all_slow["latency"])[-1]]


def decoder_plan(root: Path) -> dict[str, Any]:
    """Answers of a tiny decoder."""
    rows = [{"prompt": one["text"], "completion": f" {one['label']}"} for one in reviews(60)]
    return {
        "model": {"name": str(decoder(root / "decoder")), "dtype": "float32"}, "objective": "causal_lm",
        "data": {"train": str(jsonl(root / "pairs.jsonl", rows)), "test": 16, "validation": 12},
        "train": {"batch_size": 4, "steps": 8},
    }  # fmt: skip


def test_a_design_that_forgets_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured for those that would stay; one over the limit makes room for the next."""
    use_tiny_suites(tmp_path / "sets", monkeypatch)
    measure, asked = forgetting.wiki_rises, []

    def measured(run: Any, names: list[str], *rest: Any) -> dict[str, float]:
        asked.extend(names)
        found = measure(run, names, *rest)  # the real numbers, and the first one of them made too large
        return {name: 0.5 if name == asked[0] else min(value, 0.01) for name, value in found.items()}

    monkeypatch.setattr(runner, "wiki_rises", measured)
    figures = search(tmp_path, run=decoder_plan(tmp_path), goal={"max_forgetting": 0.02})
    last = {one["name"]: one for one in figures["rungs"][-1]["decisions"]}
    assert last[asked[0]]["what"] == "forgets"
    assert last[asked[0]]["forgetting"] == 0.5
    assert asked[0] not in [one["name"] for one in figures["confirmation"]["designs"] if one["name"] != "default"]
    of_run = json.loads((tmp_path / "out" / "confirm" / "results.json").read_text(encoding="utf-8"))
    assert "wiki" in of_run["forgetting"]["default-s0"]["sets"]
    assert "against forgetting" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("against", [[], ["forgetting"]], ids=["a limit", "traded"])
def test_where_forgetting_is_traded_all_are_measured(against: list[str]) -> None:
    """The order of the candidates is by what they forget, which an unmeasured one would win."""
    found = population(2, goal={"against": against, "max_forgetting": 1.0})
    results, asked = found.results.pop(), []
    found.decisions.pop()
    left = [name for name in results[0].names if name not in results[0].diverged]

    def measure(name: str) -> float:
        asked.append(name)
        return 0.01 * (len(left) - left.index(name))

    measured = runner._rises(found, results, measure)
    assert (set(asked) == set(left)) == bool(against)
    found.rises |= measured
    kept = [replace(results[0], rises=measured)]
    assert {one.name for one in found.finish_rung(kept) if one.what != "diverged"} == set(left)


def test_several_objectives_are_proposed_by_nsga_and_stay_by_their_front(tmp_path: Path) -> None:
    """What the metric is traded against is among each candidate's costs, by which the Pareto order is."""
    plan = loaded(tmp_path, goal={"against": ["trainable_parameters"]})
    first = [params for params, _, _ in propose(plan, 0, [], 8)][:8]
    results = [(params, (0.5 + 0.01 * i, 1000.0 * (i + 1))) for i, params in enumerate(first)]
    assert len(list(propose(plan, 1, results, 4))) > 4
    with pytest.raises(ValueError, match="different from the number of objectives 1"):
        next(propose(loaded(tmp_path), 1, results, 4))
    for goal, costs in (({}, ()), ({"against": ["trainable_parameters", "latency"]}, (1000.0, 1.0))):
        found = population(1, goal=goal)
        assert found.standings(found.results[0])[0].costs == costs


def test_a_range_is_drawn_within_its_ends(tmp_path: Path) -> None:
    space = {
        "method": ["Houlsby", "LoRA"],
        "Houlsby": {"width": {"low": 3, "high": 40, "log": True}},
        "LoRA": {"dropout": {"low": 0.05, "high": 0.2}, "rank": [2]},
    }
    plan = loaded(tmp_path, space=space)
    widths, dropouts = set(), set()
    for params, method, _ in propose(plan, 0, [], 8):
        if isinstance(method, kitout.Houlsby):
            widths.add(method.width)
            assert params["Houlsby.width"] == method.width
        else:
            assert isinstance(method, kitout.LoRA)
            dropouts.add(method.dropout)
    assert len(widths) > 8
    assert all(isinstance(one, int) and 3 <= one <= 40 for one in widths)
    assert len(dropouts) > 8
    assert all(0.05 <= one <= 0.2 for one in dropouts)
