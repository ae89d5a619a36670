"""The display while a real (tiny) Trainer runs, on a terminal and elsewhere, and the metrics file it leaves."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from kitout.train.metrics_log import MetricsLog, read_metrics, to_json_value
from kitout.train.progress import ProgressDisplay


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        guess = self.linear(x).squeeze(-1)
        return {"loss": ((guess - labels) ** 2).mean(), "logits": guess}


class LoggingTrainer(Trainer):
    """Logs what kitout's own loop logs."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {"tokens": 2310.0 * self.state.global_step, "tokens_per_second": 2310.4, "memory": 1.4e9}
        super().log(logs, start_time)


DATA = [{"x": torch.full((4,), i / 40), "labels": torch.tensor(float(i % 2))} for i in range(40)]


def run(
    folder: Path,
    progress: ProgressDisplay,
    steps: int = 40,
    resume: bool = False,
    stop: Callable[[int], None] | None = None,
) -> None:
    arguments = TrainingArguments(
        str(folder / "checkpoints"), max_steps=steps, logging_steps=1, eval_strategy="steps", eval_steps=20,
        save_strategy="steps", save_steps=10, report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model = Line()
    if stop is not None:
        forward = model.forward
        calls = iter(range(10**6))

        def stopping(x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            stop(next(calls))
            return forward(x, labels)

        model.forward = stopping  # type: ignore[method-assign]
    trainer = LoggingTrainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=[progress])  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    with progress:
        trainer.train(resume_from_checkpoint=resume or None)


def console(terminal: bool, width: int = 100) -> Console:
    colors: Any = "standard" if terminal else None
    return Console(force_terminal=terminal, file=io.StringIO(), width=width, color_system=colors)


def shown(progress: ProgressDisplay) -> str:
    assert isinstance(progress.console.file, io.StringIO)
    return progress.console.file.getvalue()


def test_plain_lines(tmp_path: Path) -> None:
    progress = ProgressDisplay(tmp_path, console(terminal=False))
    run(tmp_path, progress)
    output = shown(progress)
    lines = output.strip().split("\n")
    assert "\x1b" not in output
    assert "\r" not in output
    assert lines[0].startswith("step  1/40  loss ")
    assert re.fullmatch(
        r"step 40/40  loss [\d.e-]+  lr [\d.e-]+  grad norm [\d.e-]+  tokens 92\.4 k at 2,310/s  memory 1\.3 GiB  "
        r"time [\d.]+ s",
        lines[-3],
    )
    assert sum("validation" in line for line in lines) == 2
    assert lines[-1].startswith("trained: 40 steps in ")
    assert len(lines) <= 25


def test_a_terminal_gets_one_panel(tmp_path: Path) -> None:
    progress = ProgressDisplay(tmp_path, console(terminal=True))
    run(tmp_path, progress)
    output = shown(progress)
    assert "\x1b[?25l" in output  # the cursor is hidden ...
    assert output.rstrip().endswith("\x1b[?25h")  # ... and shown again
    plain_text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert "step 40 / 40" in plain_text
    assert "100 %" in plain_text
    assert plain_text.count("validation  loss") == 2
    assert "evaluating ..." in plain_text
    assert "evaluating" not in plain_text[plain_text.rindex("validation") :]
    assert "trained:" not in output
    assert len(output) < 20_000  # drawn a few times a second, not at every step


@pytest.mark.parametrize("width", [20, 40, 300])
def test_any_width(tmp_path: Path, width: int) -> None:
    progress = ProgressDisplay(tmp_path, console(terminal=True, width=width))
    run(tmp_path, progress, steps=2)
    assert "2" in shown(progress)


def test_the_metrics_file_has_every_log(tmp_path: Path) -> None:
    run(tmp_path, ProgressDisplay(tmp_path, console(terminal=False)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in lines if "eval_loss" in line] == [20, 40]
    assert {"loss", "grad_norm", "learning_rate", "tokens", "memory", "epoch"} <= set(lines[0])
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


@pytest.mark.parametrize("incomplete", [b"", b'{"step": 25, "lo', b'{"step": 25}\n{"step": 26, "loss": 1'])
def test_no_step_is_in_the_file_twice_after_a_resume(tmp_path: Path, incomplete: bytes) -> None:
    def stop(call: int) -> None:
        if call == 25 + 1:  # forwards of 25 steps and one evaluation
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ProgressDisplay(tmp_path, console(terminal=True)), stop=stop)
    file = tmp_path / "metrics.jsonl"
    assert [line["step"] for line in read_metrics(file)][-1] > 20  # beyond the checkpoint
    with file.open("ab") as end:
        end.write(incomplete)
    progress = ProgressDisplay(tmp_path, console(terminal=False))
    run(tmp_path, progress, resume=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in lines if "eval_loss" in line] == [20, 40]
    assert shown(progress).startswith("resumes after step 20 of 40\n")
    assert shown(progress).rstrip().split("\n")[-1].startswith("trained: 20 steps")


def test_a_run_from_the_start_replaces_the_file(tmp_path: Path) -> None:
    for _ in range(2):
        run(tmp_path, ProgressDisplay(tmp_path, console(terminal=False)), steps=3)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line] == [1, 2, 3]


def test_an_interrupt_restores_the_terminal(tmp_path: Path) -> None:
    def stop(call: int) -> None:
        if call == 3:
            raise KeyboardInterrupt

    progress = ProgressDisplay(tmp_path, console(terminal=True))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress, stop=stop)
    assert shown(progress).rstrip().endswith("\x1b[?25h")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "logs",
    [
        {},
        {"loss": float("nan"), "learning_rate": None, "grad_norm": float("inf")},
        {"loss": torch.tensor(1.5), "tokens": "many", "memory": None, "tokens_per_second": 3},
        {"eval_loss": None, "eval_answers": ["[red]", "\x1b[31m"], "eval_f1": 0.5},
        {"legal/loss": 0.5, "legal/learning_rate": 1e-4, "medic/loss": 2, "a/b/c": "[bold]", "/": 1},
        {"strange": object()},
    ],
)
def test_any_logged_value_is_displayed(tmp_path: Path, terminal: bool, logs: Mapping[str, Any]) -> None:
    progress = ProgressDisplay(tmp_path, console(terminal))
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    state, control = TrainerState(max_steps=0), TrainerControl()
    with progress:
        progress.on_log(arguments, state, control, logs)  # before anything has begun
        progress.on_train_begin(arguments, state, control)
        for step in (1, 2):
            state.global_step = step
            progress.on_step_end(arguments, state, control)
            progress.on_log(arguments, state, control, logs)
            progress.on_prediction_step(arguments, state, control)
            progress.on_save(arguments, state, control)
        progress.on_log(arguments, state, control, None)
        progress.on_train_end(arguments, state, control)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert "\x1b[31m" not in shown(progress)


def test_every_job_has_a_row(tmp_path: Path) -> None:
    progress = ProgressDisplay(tmp_path, console(terminal=True))
    state = TrainerState(max_steps=9)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with progress:
        progress.on_train_begin(arguments, state, TrainerControl())
        progress.on_log(arguments, state, TrainerControl(), {"loss": 1.0, "legal/loss": 0.5, "medic/loss": 0.25})
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(progress))
    assert re.search(r"legal +0\.5\b", output)
    assert re.search(r"medic +0\.25\b", output)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_an_objective_measures_is_displayed_by_its_name(tmp_path: Path, terminal: bool) -> None:
    progress = ProgressDisplay(tmp_path, console(terminal=terminal, width=200))
    state = TrainerState(max_steps=9)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    logs = {
        "loss": 1.0, "epoch": 0.5, "reward_margin": 0.25, "entropy": float("inf"), "low/entropy": 1.5, "other": object()
    }  # fmt: skip
    with progress:
        progress.on_train_begin(arguments, state, TrainerControl())
        progress.on_log(arguments, state, TrainerControl(), logs)
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(progress))
    assert re.search(r"loss 1 +reward margin 0\.25 +entropy not finite +time", output)
    assert "epoch" not in output
    assert not terminal or re.search(r"low +1\.5\b", output)


def test_other_processes_are_silent(tmp_path: Path) -> None:
    progress = ProgressDisplay(tmp_path / "run", console(terminal=True))
    state = TrainerState(max_steps=3, is_world_process_zero=False)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    progress.on_train_begin(arguments, state, TrainerControl())
    progress.on_log(arguments, state, TrainerControl(), {"loss": 1.0})
    progress.on_step_end(arguments, state, TrainerControl())
    progress.on_train_end(arguments, state, TrainerControl())
    assert shown(progress) == ""
    assert not (tmp_path / "run").exists()


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    progress = ProgressDisplay(tmp_path, console(terminal=True))
    run(tmp_path, progress, steps=2)
    assert "\x1b[?25l" not in shown(progress)
    assert "step 2/2" in shown(progress)


def test_json_values() -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor(3), float("inf"), True, None, "x", (1, 2.5), {"a"}]
    assert [to_json_value(v) for v in values] == [[1.0, 2.0], 3, None, True, None, "x", [1, 2.5], "{'a'}"]


def test_lines_written_before_training_are_kept_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for start in (0, 0, 1):
        metrics = MetricsLog(file)
        metrics.write(0, {"eval_loss": 2.0})
        metrics.resume_at(start)
        metrics.write(1 + start, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(file)] == [0, 1, 2]


ROUND = {
    "loss": 1e-8, "learning_rate": 1e-3, "grad_norm": 0.1, "reward": 0.48064, "reward_low": 0.3, "reward_high": 0.6,
    "answer_tokens": 6.0, "ended": 0.25, "unjudged": 0.0, "ppo/clip_fraction": 0.125, "ppo/entropy": 5.98,
    "ppo/ratio": 1.0, "value/loss": 0.04, "kl_to_reference": 0.02, "explained_variance": -3.5, "tokens": 864.0,
}  # fmt: skip


def log_rounds(folder: Path, console: Console, rounds: list[dict[str, Any]]) -> ProgressDisplay:
    display = ProgressDisplay(folder, console)
    state = TrainerState(max_steps=len(rounds))
    display.on_train_begin(None, state, None)
    for step, values in enumerate(rounds, 1):
        state.global_step = step
        display.on_log(None, state, None, values)
    return display


def test_a_round_of_answers_is_a_short_line(tmp_path: Path) -> None:
    page = io.StringIO()
    log_rounds(
        tmp_path, Console(file=page, width=300), [ROUND, ROUND | {"groups_without_spread": 0.5, "unjudged": 0.1}]
    )
    first, second = page.getvalue().splitlines()
    assert first.startswith(
        "step 1/2  reward 0.481 (0.3 to 0.6)  KL 0.02  entropy 5.98  length 6  clipped 12 %  explained -3.5"
    )
    for hidden in ("loss", "lr", "ratio", "unjudged", "spread", "memory"):
        assert hidden not in first
    assert "no spread 50 %  unjudged 10 %" in second


def test_a_panel_of_rounds_has_the_first_one_and_the_last(tmp_path: Path) -> None:
    page = io.StringIO()
    console = Console(file=page, force_terminal=True, width=110)
    log_rounds(tmp_path, console, [ROUND, ROUND | {"reward": 0.9, "reward_taste": 0.7}]).close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", page.getvalue()).splitlines()
    first, now = (next(line for line in reversed(shown) if line.startswith(name)) for name in ("first", "now"))
    assert "0.481 (0.3 to 0.6)" in first
    assert "0.9 (0.3 to 0.6)" in now
    assert now.split()[-1] == "0.7"
    heading = shown[shown.index(first) - 1]
    assert [word for word in heading.split() if word not in ("no", "spread")] == [
        "reward", "KL", "entropy", "length", "ended", "clipped", "explained", "taste",
    ]  # fmt: skip


def test_a_line_of_pairs_has_their_margin_alone(tmp_path: Path) -> None:
    page, values = io.StringIO(), {"loss": 0.5, "chosen_reward": 0.2, "rejected_reward": 0.1, "margin": 0.1}
    log_rounds(tmp_path, Console(file=page, width=300), [values])
    assert "margin 0.1" in page.getvalue()
    assert "chosen" not in page.getvalue()
