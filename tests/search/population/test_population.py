"""What follows from the measures of a population: its front, its limits, how many more the budget holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kitout import IA3, LoRA
from kitout.search.plan.load import load_plan
from kitout.search.plan.rungs import plan_rungs
from kitout.search.population.design import Design
from kitout.search.population.population import Population
from kitout.search.population.rung import Length, RungResult
from search.plan.plans import PLAN
from search.population.test_survivors import standing

LENGTH = Length(80, 10, "float32", None, 3)


def population(correct: dict[str, int], max_examples: int = 10**9) -> tuple[Population, RungResult]:
    """Designs by name with their number of right answers; the trainable parameters are those of their order."""
    plan = load_plan(PLAN)
    found = Population(plan, LENGTH, plan_rungs(len(correct), 4, 1 / 4), max_examples)
    found.designs = {
        name: Design(name, LoRA() if i else IA3(), 1e-3, "proposed", {}, trainable=100 * (i + 1))
        for i, name in enumerate(correct)
    }
    scores = {name: standing(name, number).scores for name, number in correct.items()}
    losses = {name: 1.0 + i for i, name in enumerate(correct)}
    return found, RungResult(
        end=20, names=tuple(correct), metric="accuracy", diverged={}, seconds=1.0, training_seconds=1.0,
        examples=20 * 10 * len(correct), memory=1, checkpoint="checkpoints/checkpoint-20", scores=scores, losses=losses,
    )  # fmt: skip


def test_the_front_has_no_design_that_another_beats_in_both() -> None:
    found, result = population({"a": 177, "b": 176, "c": 180, "d": 180})
    found.finish_rung([result])
    found.finish_rung([replace(result, end=80)])
    assert [one.name for one in found.front(but="default")] == ["c", "a"], "d is as good as c with more parameters"
    assert [one.name for one in found.front(but="c")] == ["a"]


@pytest.mark.parametrize(("spare", "stay"), [(0, 1), (599, 1), (600, 2), (1800, 4)])
def test_ties_stay_while_the_budget_of_examples_lasts(spare: int, stay: int) -> None:
    """A further candidate of the second rung takes 60 steps of 10 examples."""
    planned = 4 * 20 * 10 + 1 * 60 * 10
    found, result = population(dict.fromkeys("abcd", 150), planned + spare)
    assert sum(one.stays for one in found.finish_rung([result])) == stay


def test_a_design_slower_than_the_limit_is_no_recommendation() -> None:
    found, _ = population({"a": 1})
    found.latency = {"a": 1.25, "b": 1.05}
    assert found.with_limits(found.designs["a"]).over_budget == "1.25 x the frozen model's forward of 1.1"
    assert found.with_limits(replace(found.designs["a"], name="b")).over_budget == ""


def test_checkpoints_and_rises_are_those_of_the_last_rung(tmp_path: Path) -> None:
    found, result = population({"a": 1, "b": 2})
    found.add(result, tmp_path / "0")
    found.add(replace(result, names=("b",), rises={"b": 0.5}, checkpoint="checkpoints/checkpoint-80"), tmp_path / "1")
    assert found.checkpoints["a"] == tmp_path / "0/checkpoints/checkpoint-20"
    assert found.checkpoints["b"] == tmp_path / "1/checkpoints/checkpoint-80"
    assert found.rises == {"b": 0.5}
