"""SIGTERM and Ctrl-C: the step ends, a checkpoint is written, a message says how it goes on, and it goes on exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner

from kitout import Kit, LoRA
from kitout.cli import app
from kitout.train import checkpoints
from kitout.train.loop.jobs import Job
from kitout.train.progress import ProgressDisplay
from tiny_models import decoder, jsonl, reviews
from train.fixtures import add, causal, job, kit_of, loop_of, texts, values


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell lets its background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class SendSignal(TrainerCallback):
    """In the middle of a step, as it comes in life."""

    def __init__(self, number: int, step: int, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            for _i in range(self.times):
                os.kill(os.getpid(), self.number)


def jobs(kit: Kit) -> list[Job]:
    items = texts(20)
    add(kit, "low", LoRA(rank=2, dropout=0.1))
    return [job("low", causal(kit, ["low"], items), items, steps=6)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_costs_no_step(tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    whole = kit_of("llama")
    loop_of(whole, jobs(whole), tmp_path / "whole").train()
    kit = kit_of("llama")
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        loop_of(kit, jobs(kit), tmp_path / "cut", callbacks=[SendSignal(number, 2)]).train()
    assert stopped.value.args == (number,)
    assert signal.getsignal(number) is before
    assert f"{number.name}: stops after this step" in capfd.readouterr().err
    (last,) = checkpoints.list_checkpoints(tmp_path / "cut")
    assert checkpoints.step_of(last) == 3
    again = kit_of("llama")
    loop_of(again, jobs(again), tmp_path / "cut").train(str(last))
    assert all(torch.equal(value, values(whole, "low")[name]) for name, value in values(again, "low").items())


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    kit = kit_of("llama")
    with pytest.raises(KeyboardInterrupt):
        loop_of(kit, jobs(kit), tmp_path, callbacks=[SendSignal(signal.SIGTERM, 2, times=2)]).train()
    assert not checkpoints.list_checkpoints(tmp_path)


def test_the_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": row["text"], "completion": f" {row['label']}"} for row in reviews(30)]
    data, model = jsonl(tmp_path / "d.jsonl", rows), decoder(tmp_path / "model")
    args = ["train", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "train.steps=4",
            "train.batch_size=2", "model.dtype=float32", "evaluate.generate_examples=0"]  # fmt: skip
    sender = SendSignal(signal.SIGTERM, 1)
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "on_step_begin", lambda _, *a, **k: sender.on_step_begin(*a, **k))
        result = CliRunner().invoke(app, args)
    assert result.exit_code == 143
    assert "the same command resumes from the last checkpoint" in result.output
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2").is_dir()
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0
    assert "resumes after step 2 of 4" in result.output
