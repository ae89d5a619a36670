"""Ctrl-C in a stage: in a round of answers, in a step, while the reference is computed. The same command goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from align.test_run import data_of
from kitout.align.objectives.policy import PolicyObjective
from kitout.align.objectives.preference_objective import PreferenceObjective
from kitout.align.objectives.scored_answers import AnswerScorer
from kitout.align.rewards.user_function import FunctionReward
from kitout.cli import app
from kitout.train.metrics_log import read_metrics
from tiny_models import decoder

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell lets its background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("models") / "decoder")


def command(kind: str, model: Path, folder: Path, out: Path) -> list[str]:
    data = folder / f"{kind}.jsonl"
    data = data if data.is_file() else data_of(kind, folder)
    args = ["align", kind, "--model", str(model), "--data", str(data), "--out", str(out), "train.steps=4",
            "train.lr=1e-2", "model.dtype=float32", "data.test=4", "data.validation=0"]  # fmt: skip
    if kind == "dpo":
        return [*args, "train.batch_size=4"]
    return [*args, "--reward", "align.test_run:count_letters", "rollout.prompts=2", "rollout.samples=3",
            "rollout.max_new_tokens=4", "loss.iterations=2", "loss.beta=0.1"]  # fmt: skip


def interrupted(method: Callable[..., Any], call: int, times: int = 1) -> Callable[..., Any]:
    """The method, in whose call of that number Ctrl-C is pressed."""
    calls = 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        for _ in range(times if calls == call else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return method(*args, **kwargs)

    return run


@pytest.mark.parametrize(
    ("kind", "where", "name", "call", "times", "has_checkpoint"),
    [
        ("grpo", FunctionReward, "score", 2, 1, True),  # in the second round
        ("grpo", FunctionReward, "score", 2, 2, True),  # twice: at once, from the last checkpoint that there is
        ("grpo", PolicyObjective, "losses", 5, 1, True),  # some are tried before the first step
        ("dpo", PreferenceObjective, "losses", 5, 1, True),
        ("dpo", AnswerScorer, "__call__", 3, 1, False),  # while the reference is computed
    ],
)
def test_the_same_command_goes_on_to_the_same_bits(
    kind: str, where: Any, name: str, call: int, times: int, has_checkpoint: bool, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runner = CliRunner()
    whole = runner.invoke(app, command(kind, model, tmp_path, tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    cut = command(kind, model, tmp_path, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupted(getattr(where, name), call, times))
        stopped = runner.invoke(app, cut)
    assert stopped.exit_code == 128 + signal.SIGINT, stopped.output
    assert "stopped; the same command resumes from the last checkpoint" in stopped.output
    checkpoints = [path.name for path in (tmp_path / "cut" / "checkpoints").glob("*")]
    assert bool(checkpoints) == has_checkpoint
    again = runner.invoke(app, cut)
    assert again.exit_code == 0, again.output
    assert (f"resumes after step {max(checkpoints, default='')[-1:]} of 4" in again.output) == has_checkpoint
    ours, theirs = (load_file(tmp_path / folder / "adapter/adapter.safetensors") for folder in ("cut", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    answers = [tmp_path / folder / "completions.jsonl" for folder in ("cut", "whole")]
    assert answers[1].is_file() == (kind == "grpo")
    assert not answers[1].is_file() or read_metrics(answers[0]) == read_metrics(answers[1])
