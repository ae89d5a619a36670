"""Checkpoints: a kill at any point, a full disk or a damaged file loses no earlier checkpoint, and not one bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from kitout import LoRA
from kitout.errors import ConfigError, FileError
from kitout.train import checkpoints
from train import subprocess_runs as runs
from train.fixtures import add, causal, job, kit_of, loop_of, losses, texts, values
from train.other_processes import run_in_processes, start_process


@pytest.mark.parametrize(
    ("kills", "kind"), [(3, "texts"), (3, "images"), pytest.param(12, "texts", marks=pytest.mark.slow)]
)
def test_a_run_killed_several_times_is_bit_identical_to_an_uninterrupted_one(
    tmp_path: Path, kills: int, kind: str
) -> None:
    (uninterrupted,) = run_in_processes(runs.resume_run, tmp_path / "whole", kind)
    folder = tmp_path / "killed"
    leftovers, steps = set(), set()
    for kill in range(kills):
        process, _ = start_process(runs.resume_run, folder, kind)
        last_step = newest(folder)
        while newest(folder) == last_step and process.is_alive():
            time.sleep(0.002)
        time.sleep(0.0007 * (kill % 5))  # into the next step, or into the middle of the next checkpoint
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        leftovers |= {path.name.split(".")[-1] for path in folder.glob(".checkpoint*")}
        steps.add(newest(folder))
        if newest(folder) == 10:
            break
    (last,) = run_in_processes(runs.resume_run, folder, kind)
    assert len(steps) >= 3, "it was killed at different points"
    assert last["from"] != "None"
    assert last["losses"] == uninterrupted["losses"]
    assert last["weights"] == uninterrupted["weights"]
    assert all(seconds > 0 for job in last["job_seconds"] for seconds in job)
    assert not list(folder.glob(".checkpoint*")), f"left by kills: {leftovers}"


def newest(folder: Path) -> int:
    """The highest step of a checkpoint, without deleting anything."""
    return max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0)


def small_run(tmp_path: Path, steps: int = 4, **settings: Any) -> Any:
    kit, items = kit_of("llama"), texts(12)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=steps)
    settings = {"save_strategy": "steps", "save_steps": 1} | settings
    return kit, loop_of(kit, [one], tmp_path, **settings)


def test_what_a_kill_left_incomplete_is_deleted_or_finished(tmp_path: Path) -> None:
    _, loop = small_run(tmp_path, num_checkpoints=9)
    loop.train()
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [1, 2, 3, 4]
    (tmp_path / ".checkpoint-5.new").mkdir()
    (tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.old")  # killed between the two renames
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".checkpoint-2.old")  # killed after both
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.deleted")  # killed while it was deleted
    for step, missing in ((4, checkpoints.TENSORS), (5, checkpoints.STATE)):  # as earlier versions deleted
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / f"checkpoint-{step}", dirs_exist_ok=True)
        (tmp_path / f"checkpoint-{step}" / missing).unlink()
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "model.safetensors").touch()  # not ours
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-7"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    eval_losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    _, loop = small_run(
        tmp_path, steps=6, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", greater_is_better=False,
        evaluate_fn=lambda: {"eval_loss": next(eval_losses)}, num_checkpoints=2,
    )  # fmt: skip
    loop.train()
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [2, 5, 6]


@pytest.mark.parametrize(
    ("name", "is_half"),
    [
        (checkpoints.TENSORS, True),
        (checkpoints.TENSORS, False),
        (checkpoints.PROGRESS, True),
        (checkpoints.STATE, True),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, is_half: bool) -> None:
    _, loop = small_run(tmp_path, steps=2)
    loop.train()
    last = checkpoints.list_checkpoints(tmp_path)[-1]
    content = (last / name).read_bytes()
    (last / name).write_bytes(content[: len(content) // 2 if is_half else 0])
    _, again = small_run(tmp_path, steps=2)
    with pytest.raises(FileError, match=r"checkpoint-2 is damaged .*delete it"):
        again.train(str(last))
    with pytest.warns(UserWarning, match="checkpoint-2 is damaged and not used"):
        assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [1]
    assert last.is_dir()


def test_other_data_or_another_adapter_is_refused(tmp_path: Path) -> None:
    _, loop = small_run(tmp_path, run_id="one")
    loop.train()
    last = str(checkpoints.list_checkpoints(tmp_path)[-1])
    _, other = small_run(tmp_path, run_id="other")
    with pytest.raises(ConfigError, match="belongs to another run"):
        other.train(last)
    for method in (LoRA(rank=3), LoRA(rank=2, targets="attn.o")):
        kit, items = kit_of("llama"), texts(12)
        add(kit, "low", method)
        with pytest.raises(FileError, match="another adapter"):
            loop_of(kit, [job("low", causal(kit, ["low"], items), items)], tmp_path, run_id="one").train(last)


def fill_disk(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Nothing can be written any more."""

    def full(*_: Any, **__: Any) -> Any:
        if how == "values":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        *{"values": (checkpoints, "save_file"), "flush": (os, "fsync"), "rename": (os, "replace")}[how], full
    )


@pytest.mark.parametrize("how", ["values", "flush", "rename"])
def test_a_full_disk_costs_one_checkpoint_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    _, loop = small_run(tmp_path / "whole")
    loop.train()
    _, other = small_run(tmp_path / "full", num_checkpoints=9)
    save = other._save_checkpoint

    def save_on_full_disk(*args: Any) -> None:
        with monkeypatch.context() as patch:
            if other.state.global_step == 3:
                fill_disk(patch, how)
            save(*args)

    other._save_checkpoint = save_on_full_disk
    with pytest.warns(RuntimeWarning, match=r"no checkpoint of step 3 \(the disk is full\)"):
        other.train()
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path / "full")] == [1, 2, 4]
    assert not list((tmp_path / "full").glob(".*"))
    assert losses(other) == losses(loop)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_a_file_that_really_cannot_grow(tmp_path: Path) -> None:
    assert run_in_processes(runs.train_with_limited_files, tmp_path) == [[1]]


def test_early_stopping_keeps_its_patience_over_a_resume_and_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    all_losses = [3.0, 1.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9]

    def run(folder: Path, start: int, until: int | None = None) -> Any:
        eval_losses = iter(all_losses[start:])

        def evaluate() -> dict[str, float]:
            if until is not None and loop.state.global_step > until:
                raise KeyboardInterrupt
            return {"eval_loss": next(eval_losses)}

        kit, loop = small_run(
            folder, steps=8, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss",
            greater_is_better=False, evaluate_fn=evaluate, callbacks=[EarlyStoppingCallback(3)],
            load_best_model_at_end=False,
        )  # fmt: skip
        if start:
            loop.train(str(checkpoints.list_checkpoints(folder)[-1]))
        else:
            try:
                loop.train()
            except KeyboardInterrupt:
                assert until is not None
        return kit, loop

    _, whole = run(tmp_path / "whole", 0)
    assert whole.state.global_step == 5, "best at 2, three worse ones"
    run(tmp_path / "cut", 0, until=4)
    _, again = run(tmp_path / "cut", 4)
    assert again.state.global_step == 5
    last = {name: value.clone() for name, value in again.trained_tensors().items()}
    assert again.load_best() == 2
    best = checkpoints._read_tensors(tmp_path / "cut" / "checkpoint-2", "value.")
    assert all(torch.equal(value, best[name]) for name, value in again.trained_tensors().items())
    assert any(not torch.equal(value, last[name]) for name, value in again.trained_tensors().items())
    _, third = run(tmp_path / "cut", 5)
    assert third.state.global_step == 5, "it had stopped"
    assert all(torch.equal(value, last[name]) for name, value in third.trained_tensors().items())


def test_a_best_checkpoint_that_was_never_written_is_warned_of(tmp_path: Path) -> None:
    eval_losses = iter([1.0, 2.0, 3.0])
    kit, loop = small_run(
        tmp_path, steps=3, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", greater_is_better=False,
        evaluate_fn=lambda: {"eval_loss": next(eval_losses)},
    )  # fmt: skip
    loop.train()
    shutil.rmtree(tmp_path / "checkpoint-1")
    before = values(kit, "low")
    with pytest.warns(UserWarning, match="the last step's values are kept"):
        assert loop.load_best() == 3
    assert all(torch.equal(value, before[name]) for name, value in values(kit, "low").items())


def test_losses_between_two_logs_survive_a_resume(tmp_path: Path) -> None:
    _, whole = small_run(tmp_path / "whole", logging_steps=4)
    whole.train()
    _, first = small_run(tmp_path / "cut", logging_steps=4)
    first.train()
    _, again = small_run(tmp_path / "cut", logging_steps=4)
    again.train(str(tmp_path / "cut" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    assert again.step_runner.tokens == whole.step_runner.tokens
    assert again.state.log_history[-1]["train_loss"] == whole.state.log_history[-1]["train_loss"]


def test_the_mean_loss_of_a_run_that_was_killed_after_its_last_step_covers_all_steps(tmp_path: Path) -> None:
    _, whole = small_run(tmp_path)
    whole.train()
    _, again = small_run(tmp_path)
    again.train(str(tmp_path / "checkpoint-4"))
    assert again.state.log_history[-1]["train_loss"] == whole.state.log_history[-1]["train_loss"] > 1


def test_progress_is_plain_json(tmp_path: Path) -> None:
    _, loop = small_run(tmp_path, steps=2)
    loop.train()
    progress = json.loads((tmp_path / "checkpoint-2" / checkpoints.PROGRESS).read_text())
    assert {"run", "micro", "counts", "stopped", "ended", "scheduler"} <= progress.keys()


def test_what_a_kill_behind_the_last_step_left_is_deleted(tmp_path: Path) -> None:
    kit, items = kit_of("llama"), texts(8)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=2)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "num_checkpoints": 1}
    loop_of(kit, [one], tmp_path, **settings).train()
    last = tmp_path / "checkpoint-2"
    shutil.copytree(last, tmp_path / "checkpoint-1")  # as before the older one was deleted
    loop_of(kit, [one], tmp_path, **settings).train(str(last))
    assert checkpoints.list_checkpoints(tmp_path) == [last]
