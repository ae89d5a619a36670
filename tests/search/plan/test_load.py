"""Plans: read, written and read again; every error of one at once, with what to write instead."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from kitout.errors import ConfigError
from kitout.search.plan.describe import EXAMPLE
from kitout.search.plan.load import build_plan, load_plan
from kitout.train.config.yaml_file import parse_yaml
from search.plan.plans import PLAN


def changed(**sections: Any) -> dict[str, Any]:
    plan = copy.deepcopy(PLAN)
    for name, value in sections.items():
        plan[name] = {**plan[name], **value} if isinstance(value, dict) and name in plan else value
    return plan


def errors_of(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_plan(values)
    return str(caught.value)


def test_a_plan_is_read_and_written() -> None:
    plan = load_plan(PLAN)
    assert load_plan(plan.to_dict()) == plan
    assert plan.space.num_designs() == 4 * 3 * 2 + 4
    assert load_plan(parse_yaml(EXAMPLE, "example")).candidates == 16
    assert load_plan(changed(space={"method": "LoRA", "LoRA": {"rank": [2]}})).space.method == ("LoRA",)


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("run: {model: smollm2-135m, data: tweets}\nspace: {method: [LoRA, IA3]}\n")
    plan = build_plan(file, ["run.train.steps=32", "space.lr.multipliers=1", "budget.max_bytes=1000", "candidates=4"])
    assert plan.run.train.steps == 32
    assert plan.space.method == ("LoRA", "IA3")
    assert plan.space.lr.ends == (1.0, 1.0)
    assert plan.budget.max_bytes == 1000


def test_all_errors_are_reported_at_once() -> None:
    text = errors_of(
        changed(
            run={"jobs": [{"name": "a"}], "train": {"seeds": [1, 2], "from": "x"}, "data": {"train": "t", "test": 0}},
            space={"LoRA": {"rank": [2, -1, "x"], "rnk": [1], "layers": []}, "IA33": {"x": [1]}, "Houlsby": 3},
            budget={"max_latency": 0.9},
            goal={"against": ["size"]},
            candidates=1,
            halving={"factor": 1},
        )
    )
    for expected in (
        "run.jobs: a search varies one design", "run.train.seeds", "run.train.from", "run.data.test",
        "space.LoRA.rank: rank: rank must be at least 1, found -1", "space.LoRA.rnk: LoRA has no such setting",
        "space.LoRA.layers: expected at least one value", "space.IA33: space.method does not name it",
        "space.Houlsby: expected settings with their values", "budget.max_latency", "goal.against.0", "candidates:",
        "halving.factor",
    ):  # fmt: skip
        assert expected in text, expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"space": {"Houlsby": {"width": {"low": 8, "high": 4}}}}, "expected low below high"),
        ({"space": {"Houlsby": {"width": {"low": 0, "high": 4, "log": True}}}}, "above 0 with log"),
        ({"space": {"Houlsby": {"width": {"min": 8, "max": 4}}}}, "a range has the numbers low and high"),
        ({"space": {"Houlsby": {"width": 8}}}, "expected a list of values"),
        ({"space": {"lr": {"multipliers": [3.0, 0.3]}}}, "the lower first"),
        ({"space": {"method": ["LoRA", "lora"], "LoRA": {}}}, "each method once"),
        ({"space": {"method": ["LoRAA"], "LoRA": {}}}, "there is no method 'LoRAA': did you mean 'LoRA'"),
        ({"space": {"method": []}}, "space.method"),
        ({"goal": {"against": ["forgetting"], "max_forgetting": None}}, "goal.max_forgetting: forgetting is measured"),
        ({"run": {"train": {"steps": 2}}}, "has 3 rungs"),
        ({"run": {"train": {"steps": 800, "batch_size": 16}}}, "16 candidates are 2.50 trainings of 800 steps of 16"),
        ({"run": {"objective": "classification"}, "space": {"method": ["VPT"], "LoRA": {}}}, "VPT"),
        ({"run": "run.yaml"}, "write the run's settings here"),
    ],
)
def test_one_error(values: dict[str, Any], expected: str) -> None:
    plan = changed(**values)
    if "method" in values.get("space", {}):
        plan["space"] = values["space"] | {"lr": {}}
        if not plan["space"].get("LoRA", True):
            del plan["space"]["LoRA"]
    assert expected in errors_of(plan)
