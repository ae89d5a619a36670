"""Rungs by Ray Tune: groups, room, errors; with Ray itself a whole search that is as one without."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import kitout
from kitout.errors import ConfigError, FileError, KitoutError, UnusedSite
from kitout.install_hint import suggest_install
from kitout.search import ray_tune
from kitout.search.plan.load import load_plan
from kitout.search.population.design import Design
from kitout.search.population.rung import Length, read_failed, read_rung
from kitout.search.ray_tune import Room, check_ray, divide, engine_text, train_by_ray
from kitout.train.loop.health import Health
from search.searches import loaded, tiny_plan
from search.test_goals import decoder_plan
from tiny_suites import use_tiny_suites
from train import subprocess_runs as runs
from train.other_processes import start_process

pytest.importorskip("optuna")
pytest.importorskip("accelerate")
LENGTH = Length(8, 4, "float32", None, 3)
DESIGNS = [
    Design(name, method, 1e-3, "proposed", {})
    for name, method in (("a", kitout.LoRA(rank=2)), ("b", kitout.IA3()), ("c", kitout.Houlsby(width=2)))
]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray")


def names_of(groups: list[list[Design]]) -> list[list[str]]:
    return [[one.name for one in group] for group in groups]


def test_designs_are_divided_in_their_order() -> None:
    assert names_of(divide(DESIGNS, 1)) == [["a", "b", "c"]]
    assert names_of(divide(DESIGNS, 2)) == [["a", "b"], ["c"]]
    assert names_of(divide(DESIGNS, 9)) == [["a"], ["b"], ["c"]]
    sizes = [len(group) for group in divide(DESIGNS * 10, 4)]
    assert sum(sizes) == 30
    assert max(sizes) - min(sizes) <= 1


def test_a_trial_takes_a_gpu_or_a_part_of_the_cpus() -> None:
    one, four = Room.of([{"CPU": 8.0}]), Room.of([{"CPU": 32.0, "GPU": 4.0}])
    assert four.trials == 4
    assert four.resources(2) == four.resources(6) == {"cpu": 8, "gpu": 1}
    assert one.resources(3) == {"cpu": 2, "gpu": 0}
    assert one.resources(20) == {"cpu": 1, "gpu": 0}
    assert one.trials == max(1, 8 // torch.get_num_threads())


def test_no_trial_asks_for_more_than_a_machine_of_the_cluster_has() -> None:
    """It would wait for ever."""
    room = Room.of([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 32.0, "GPU": 2.0}])
    assert (room.trials, room.resources(1)) == (4, {"cpu": 4, "gpu": 1})
    room = Room.of([{"CPU": 4.0}, {"CPU": 2.0}, {"node:1": 1.0}])
    assert (room.cpus, room.resources(1)) == (6, {"cpu": 2, "gpu": 0})


def test_the_setting_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert loaded(tmp_path).engine == "local"
    plan = loaded(tmp_path, engine="ray", trials=3)
    assert load_plan(plan.to_dict()) == plan
    assert "each in 3 trials at most" in engine_text(plan)
    assert "each in 8 trials at most" in engine_text(loaded(tmp_path, engine="ray", trials=20))  # of 8 candidates
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "as RAY_ADDRESS=10.0.0.1:6379 has room for" in engine_text(loaded(tmp_path, engine="ray"))
    with pytest.raises(ConfigError, match="trials=3: rungs are divided into trials with engine=ray"):
        loaded(tmp_path, trials=3)
    with pytest.raises(ConfigError, match="engine"):
        loaded(tmp_path, engine="dask")


def test_without_ray_the_error_has_the_extra_and_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(ConfigError, match="Ray is not installed") as caught:
        check_ray()
    assert suggest_install(extra="ray") in str(caught.value)
    monkeypatch.setattr("kitout.search.runner.check_optuna", lambda: None)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="Ray is not installed"):
        kitout.search.run(tiny_plan(tmp_path, engine="ray", out=str(out)), log=lambda _line: None)
    assert not out.exists()


@contextmanager
def no_ray() -> Iterator[Room]:
    yield Room(0, 4, 4)


def run_here(task: Any, left: list[int], resources: dict[str, int], folder: Path) -> None:
    """Trials one after another in this process."""
    threads = torch.get_num_threads()
    for place in left:
        found = ray_tune._train_group(task, place)
        if found["error"]:
            raise ray_tune._as_error(found["kind"], found["error"], found["log"])
    torch.set_num_threads(threads)


@pytest.fixture
def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tune, "_running_ray", no_ray)
    monkeypatch.setattr(ray_tune, "_run_trials", run_here)


def test_a_group_that_cannot_be_trained_is_left_out_and_finished_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_processes: None
) -> None:
    check = Health._check_gradients

    def fail(self: Health, step: int) -> None:
        bad = [job.name for job in self.jobs if job.name == "b"]
        if bad:
            raise UnusedSite.of(bad, "no gradient there")
        check(self, step)

    monkeypatch.setattr(Health, "_check_gradients", fail)
    plan, folder, lines = loaded(tmp_path, engine="ray", trials=3), tmp_path / "rung", []
    done = train_by_ray(plan, LENGTH, DESIGNS, folder, 2, {}, lines.append)
    assert [(result.names, place.name) for result, place in done] == [(("a",), "group-0"), (("c",), "group-2")]
    assert done[0][0].failed == {"b": "no gradient there"}
    assert sum("b cannot be trained: no gradient there" in line for line in lines) == 1
    monkeypatch.setattr(ray_tune, "_running_ray", None)  # not asked again, and other trials divide nothing anew
    again = train_by_ray(loaded(tmp_path, engine="ray", trials=1), LENGTH, DESIGNS, folder, 2, {}, lines.append)
    assert [result.names for result, _ in again] == [("a",), ("c",)]
    assert again[0][0].failed == {"b": "no gradient there"}
    monkeypatch.setattr(ray_tune, "_running_ray", no_ray)
    with pytest.raises(UnusedSite, match="no gradient there"):
        train_by_ray(plan, LENGTH, [DESIGNS[1]], tmp_path / "none", 2, {}, lines.append)
    assert read_failed(tmp_path / "none" / "group-0") == {"b": "no gradient there"}


def test_latency_is_timed_once_and_before_the_trials(tmp_path: Path, without_processes: None) -> None:
    """The next rung goes on from the groups' checkpoints, in other groups."""
    plan, asked = loaded(tmp_path, engine="ray", trials=2), []

    def choose(run: Any) -> list[str]:
        asked.append([job.name for job in run.jobs])
        return ["a", "c"]

    first = train_by_ray(plan, LENGTH, DESIGNS, tmp_path / "0", 2, {}, lambda _line: None, choose=choose)
    assert asked == [["a", "b", "c"]]
    assert [result.names for result, _ in first] == [("a",), ("c",)]
    before = {name: place / result.checkpoint for result, place in first for name in result.names}
    plan = plan.model_copy(update={"trials": 1})
    left = [DESIGNS[0], DESIGNS[2]]
    ((result, _),) = train_by_ray(plan, LENGTH, left, tmp_path / "1", 4, before, lambda _line: None)
    assert result.names == ("a", "c")
    alone = train_by_ray(plan, LENGTH, left, tmp_path / "alone", 4, {}, lambda _line: None)
    assert alone[0][0].losses == pytest.approx(result.losses, rel=1e-6)


def test_an_error_of_a_trial_is_the_same_error() -> None:
    error = ray_tune._as_error("DataError", "row 3: no label", "x.log")
    assert (type(error).__name__, str(error)) == ("DataError", "row 3: no label")
    other = ray_tune._as_error("OutOfMemoryError", "out of memory", "x.log")
    assert type(other) is KitoutError
    assert "a trial of Ray failed: OutOfMemoryError: out of memory\n  all of it: x.log" in str(other)


def comparable(folder: Path) -> dict[str, Any]:
    """What search.json holds besides times and memory."""
    figures = json.loads((folder / "search.json").read_text())
    for key in ("latency", "cost"):
        figures.pop(key)
    for rung in figures["rungs"]:
        for key in ("seconds", "training_seconds", "memory"):
            rung.pop(key)
    return figures


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The decisions of every rung."""
    for rung, other in zip(ours, theirs, strict=True):
        for one, two in zip(rung["decisions"], other["decisions"], strict=True):
            assert (one["name"], one["what"]) == (two["name"], two["what"])
            for key in ("value", "p_value", "forgetting"):
                assert two[key] == (None if one[key] is None else pytest.approx(one[key], rel=1e-6, abs=1e-6))


def losses(folder: Path) -> dict[str, dict[str, float]]:
    """By rung and generation, of all its groups."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted((folder / "rungs").rglob("results.json")):
        rung = file.relative_to(folder / "rungs").parts[0]
        kept = read_rung(file.parent)
        assert kept is not None
        found.setdefault(rung, {}).update(kept.losses)
    return found


@pytest.mark.slow
@needs_ray
def test_a_search_by_ray_is_as_one_without(tmp_path: Path) -> None:
    here = kitout.search.run(tiny_plan(tmp_path), log=lambda _line: None).folder
    lines: list[str] = []
    plan = tiny_plan(tmp_path, engine="ray", trials=2, out=str(tmp_path / "ray"))
    handler = signal.getsignal(signal.SIGTERM)
    there = kitout.search.run(plan, log=lines.append).folder
    assert signal.getsignal(signal.SIGTERM) is handler
    ours, theirs = comparable(here), comparable(there)
    assert_same(ours["rungs"], theirs["rungs"])
    assert [one["examples"] for one in ours["rungs"]] == [one["examples"] for one in theirs["rungs"]]
    assert ours["designs"] == theirs["designs"]
    assert ours["answer"] == theirs["answer"]
    by_rung = losses(there)
    assert by_rung.keys() == losses(here).keys()
    for rung, own in losses(here).items():
        assert by_rung[rung] == pytest.approx(own, rel=1e-6)
    assert len(list((there / "rungs").rglob("group-*/results.json"))) == 2 * len(by_rung)
    assert any("rungs are handed to Ray Tune, each in 2 trials at most" in line for line in lines)
    assert not list(there.rglob("*.pkl"))
    assert {path.name for path in there.rglob(".*")} <= {".run.lock"}


@pytest.mark.slow
def test_forgetting_by_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_processes: None) -> None:
    """Measured in the trials of all; what is kept and decided is as where rungs are trained here."""
    use_tiny_suites(tmp_path / "sets", monkeypatch)
    monkeypatch.setattr("kitout.search.runner.check_ray", lambda: None)
    halving, goal = {"factor": 2, "first": 0.5}, {"max_forgetting": 0.02}
    sections: dict[str, Any] = {"run": decoder_plan(tmp_path), "goal": goal, "candidates": 4, "halving": halving}
    here = kitout.search.run(tiny_plan(tmp_path, **sections), log=lambda _line: None)
    sections |= {"engine": "ray", "trials": 2, "out": str(tmp_path / "ray")}
    there = kitout.search.run(tiny_plan(tmp_path, **sections), log=lambda _line: None)
    assert_same(here.figures["rungs"], there.figures["rungs"])
    last = here.figures["rungs"][-1]["decisions"]
    assert any(one["forgetting"] is not None for one in last)
    ours, theirs = ((one.folder / "trials.csv").read_text().splitlines() for one in (here, there))
    place = ours[0].split(",").index("forgetting")
    blank = [[not row[place] for row in csv.reader(lines)] for lines in (ours, theirs)]
    assert blank[0] == blank[1]


@pytest.mark.slow
@needs_ray
def test_an_error_of_a_trial_reaches_the_user_as_it_is(tmp_path: Path) -> None:
    plan = loaded(tmp_path, engine="ray", trials=2)
    before = {"a": tmp_path / "checkpoint-1", "b": tmp_path / "checkpoint-2"}  # of the first group
    with pytest.raises(FileError, match="candidates of different steps cannot go on together") as caught:
        train_by_ray(plan, LENGTH, DESIGNS, tmp_path / "rung", 4, before, lambda _line: None)
    assert "ray" not in str(caught.value)
    assert not (tmp_path / "rung" / "ray").exists()


def processes_with(variable: str) -> list[int]:
    """Those that have it in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_search_by_ray_that_is_stopped_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """Its trials end with it; what was finished is kept."""
    short = {"candidates": 4, "halving": {"factor": 4, "first": 0.25}, "confirm": {"designs": 1}}
    plan = tiny_plan(tmp_path, **short, engine="ray", trials=2)
    out, mark = Path(plan["out"]), f"{tmp_path.name}-{number.name}"
    process, _ = start_process(runs.train_until_killed, plan, 0, 0.0, env={"KITOUT_TEST_OF_RAY": mark})
    deadline = time.monotonic() + 300
    while not list(out.glob("rungs/0/group-*/results.json")):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode
    while processes_with(f"KITOUT_TEST_OF_RAY={mark}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (out / "search.json").exists()
    kept = {file: file.stat().st_mtime_ns for file in out.glob("rungs/0/group-*/results.json")}
    again = kitout.search.run({**plan, "trials": 1}, log=lambda _line: None)  # the groups stay those of the first start
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert len(list(out.glob("rungs/0/group-*/results.json"))) == 2
    here = kitout.search.run(tiny_plan(tmp_path, **short, out=str(tmp_path / "here")), log=lambda _line: None)
    assert_same(here.figures["rungs"], again.figures["rungs"])
