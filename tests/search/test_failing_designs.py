"""Designs that cannot be built, cannot be trained or diverge: the search goes on with the others and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kitout
from kitout.errors import ConfigError, UnusedSite
from kitout.search.population.design import Design
from kitout.search.population.rung import Length, read_rung, train_rung
from kitout.train.loop.health import Health
from search.searches import loaded, tiny_plan

pytest.importorskip("optuna")
pytest.importorskip("accelerate")
LENGTH = Length(8, 4, "float32", None, 3)


def design(name: str, method: kitout.Method, lr: float = 1e-3) -> Design:
    return Design(name, method, lr, "proposed", {})


def test_the_error_names_the_adapters() -> None:
    error = UnusedSite.of(["a", "b"], "nothing moves")
    assert (str(error), error.names, UnusedSite("x").names) == ("nothing moves", ("a", "b"), ())


def test_a_design_that_training_does_not_change_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are as without it, also when called again."""
    has_moved = Health._has_moved
    monkeypatch.setattr(Health, "_has_moved", lambda self, job: job.name != "still" and has_moved(self, job))
    plan, lines = loaded(tmp_path), []
    still = design("still", kitout.LoRA(rank=1))
    good = [design("a", kitout.LoRA(rank=2)), design("b", kitout.IA3())]
    result = train_rung(plan, LENGTH, [good[0], still, good[1]], tmp_path / "rung", 2, {}, lines.append)
    assert result.names == ("a", "b")
    assert list(result.failed) == ["still"]
    assert "'still' after 2 steps: none of its parameters has changed" in result.failed["still"]
    assert any(line.startswith("still cannot be trained") for line in lines)
    again = read_rung(tmp_path / "rung")
    assert again is not None
    assert again.failed == result.failed
    alone = train_rung(plan, LENGTH, good, tmp_path / "alone", 2, {}, lambda _line: None)
    assert alone.losses == pytest.approx(result.losses, rel=1e-6)
    with pytest.raises(UnusedSite, match="none of its parameters"):
        train_rung(plan, LENGTH, [still], tmp_path / "none", 2, {}, lambda _line: None)


def test_a_rung_whose_designs_all_diverge_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Health.clip

    def diverge(self: Health, step: int) -> float:
        for job in self.jobs:
            for _, value in self.trained_parameters(job):
                if value.grad is not None and step == 1:
                    value.grad.fill_(torch.nan)
        return clip(self, step)

    monkeypatch.setattr(Health, "clip", diverge)
    designs = [design("a", kitout.LoRA(rank=2)), design("b", kitout.IA3())]
    with pytest.warns(RuntimeWarning, match="the grad norm is nan"):
        result = train_rung(loaded(tmp_path), LENGTH, designs, tmp_path / "rung", 2, {}, lambda _line: None)
    assert set(result.diverged) == set(result.names) == {"a", "b"}


def test_a_search_with_a_design_that_cannot_be_attached_and_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is refused with its message and another takes its place; the second is in no rung."""
    add, check = kitout.Kit.add, Health._check_gradients

    def refuse(self: kitout.Kit, name: str, method: kitout.Method, **options: object) -> object:
        if isinstance(method, kitout.IA3):
            raise ConfigError("no IA3 here")
        return add(self, name, method, **options)  # type: ignore[arg-type]

    def fail(self: Health, step: int) -> None:
        bad = [job.name for job in self.jobs if job.name == "lora-01"]
        if bad:
            raise UnusedSite.of(bad, "no gradient there")
        check(self, step)

    monkeypatch.setattr(kitout.Kit, "add", refuse)
    monkeypatch.setattr(Health, "_check_gradients", fail)
    plan = tiny_plan(tmp_path, candidates=4, halving={"factor": 4, "first": 0.25}, confirm={"designs": 1})
    figures = kitout.search.run(plan, log=lambda _line: None).figures
    assert figures["failed"] == {"lora-01": "no gradient there"}
    assert "no IA3 here" in {one["reason"] for one in figures["refused"]}
    decided = {one["name"] for rung in figures["rungs"] for one in rung["decisions"]}
    assert decided
    assert "lora-01" not in decided
    trials = (tmp_path / "out" / "trials.csv").read_text(encoding="utf-8")
    assert "failed: no gradient there" in trials
    assert "no gradient there" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
