"""The progress display of a run: one live panel on a terminal, plain lines anywhere else, metrics.jsonl always.

A callback for `transformers.Trainer` (with disable_tqdm and without its own printers). Only the main process displays
and writes. It takes the trainer's logs as they come: no key is required, and unknown keys are written to the file too.
It knows no kit and no job.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kitout.format import format_bytes, format_count, format_duration, format_number
from kitout.train.answer_progress import answer_texts, answers_table, samples_answers
from kitout.train.metrics_log import METRICS_FILE, MetricsLog

PLAIN_LINES = 20  # of a run, besides first, last and evaluations ...
MAX_SILENT_SECONDS = 300.0  # ... and one at least in this time
FRAMES_PER_SECOND = 4  # on a terminal
EVAL_PREFIX = "eval_"
UNNAMED_VALUES = {"step", "epoch", "seconds", "processor_seconds", "total_flos", "saved"}  # not displayed
NAMED_VALUES = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm"}  # and how
COST_VALUES = {"tokens", "tokens_per_second", "memory"}  # displayed together
PANEL_VALUES = {"chosen_reward", "rejected_reward"}  # displayed on a panel alone: a line has their margin
HIDDEN_SUFFIXES = ("runtime", "_per_second", "model_preparation_time")  # endings of what Trainer adds to an evaluation


@dataclass
class ProgressState:
    """The last value of everything that is displayed, and the position of the run."""

    step: int = 0
    """Steps done."""
    steps: int = 0
    """Steps of the run; 0: unknown."""
    first_step: int = 0
    """The step at which this process started: above 0 after a resume."""
    start_time: float = field(default_factory=time.monotonic)
    """When this process started training."""
    values: dict[str, Any] = field(default_factory=dict)
    """What was logged of training, by name."""
    first_round: dict[str, Any] = field(default_factory=dict)
    """The first such values of a run that samples answers."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The metrics of the last evaluation, by name."""
    evaluation_step: int = 0
    """The step of that evaluation."""
    unit: str = "tokens"
    """What is counted of the work: tokens, or images."""
    evaluating: str = ""
    """What the panel says of an evaluation in progress."""
    batches: int = 0
    """How many batches of it are done."""

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start_time

    @property
    def remaining(self) -> float | None:
        """Estimated seconds to the end, evaluations and checkpoints included at their pace so far."""
        done = self.step - self.first_step
        return self.elapsed / done * (self.steps - self.step) if done > 0 and self.steps else None

    def update(self, step: int, logs: Mapping[str, Any]) -> bool:
        """Takes logged values over; True if they are an evaluation."""
        self.step = step
        metrics = {
            name.removeprefix(EVAL_PREFIX): value
            for name, value in logs.items()
            if name.startswith(EVAL_PREFIX) and not name.endswith(HIDDEN_SUFFIXES)
        }
        if metrics:
            self.evaluation, self.evaluation_step = metrics, step
            self.evaluating, self.batches = "", 0
        if samples_answers(logs) and not self.first_round:
            self.first_round = dict(logs)
        self.values |= {name: value for name, value in logs.items() if not name.startswith(EVAL_PREFIX)}
        return bool(metrics)

    def per_job(self) -> dict[str, dict[str, Any]]:
        """Values of several adapters trained at once, which are logged as "<job>/<name>"."""
        by_job: dict[str, dict[str, Any]] = {}
        for key, value in self.values.items():
            job, slash, name = key.rpartition("/")
            if slash:
                by_job.setdefault(job, {})[name] = value
        return by_job


def console_draws(console: Console) -> bool:
    """Whether lines can be overwritten; not in a pipe, a file, a notebook or a dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal


@final
class ProgressDisplay(TrainerCallback):  # type: ignore[misc]  # transformers is typed in part
    """The callback, and a context manager, so that an error restores the terminal. folder: of the run.

    unit: what the logged "tokens" are, for people.
    """

    def __init__(self, folder: Path, console: Console | None = None, unit: str = "tokens") -> None:
        self.console = console or Console(soft_wrap=True)
        self.metrics = MetricsLog(folder / METRICS_FILE)
        self.progress_state = ProgressState(unit=unit)
        self._live: Live | None = None
        self._plain = not console_draws(self.console)
        self._last_line_part, self._last_line_at = -1, 0.0

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the live panel and restores the terminal."""
        if self._live is not None:
            self._live.update(self._panel())
            self._live.stop()
            self._live = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        first_step, former = state.global_step, self.progress_state
        self.metrics.resume_at(first_step)
        self.progress_state = ProgressState(
            first_step, state.max_steps, first_step, unit=former.unit,
            evaluation=former.evaluation, evaluation_step=former.evaluation_step,
        )  # fmt: skip
        if not self._plain:
            # Drawn when there is something new, not by a thread of its own, which would stutter during forwards.
            self._live = Live(self._panel(), console=self.console, auto_refresh=False, transient=False)
            self._live.start(refresh=True)
        elif first_step:
            self._print_line(f"resumes after step {first_step:,} of {state.max_steps:,}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress_state.step, self.progress_state.batches = state.global_step, 0
            self.progress_state.evaluating = "evaluating ..." if control.should_evaluate else ""
            self._draw(force=control.should_evaluate)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = self.metrics.write(state.global_step, logs)
        is_evaluation = self.progress_state.update(state.global_step, line)
        if self._live is not None:
            self._draw(force=is_evaluation)
            if is_evaluation:  # stays above the panel: the run's history
                self._live.console.print(_evaluation_text(self.progress_state), soft_wrap=True)
        elif self._plain:
            self._log_line(is_evaluation)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self.progress_state.batches += 1
            self.progress_state.evaluating = f"evaluating, batch {self.progress_state.batches:,} ..."
            self._draw()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress_state.values["saved"] = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.progress_state.step = state.global_step
        self.close()
        if self._plain:
            num_steps = self.progress_state.step - self.progress_state.first_step
            self._print_line(f"trained: {num_steps:,} steps in {format_duration(self.progress_state.elapsed)}")

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._live is not None and (force or now - self._last_line_at >= 1 / FRAMES_PER_SECOND):
            self._last_line_at = now
            self._live.update(self._panel(), refresh=True)

    def _log_line(self, is_evaluation: bool) -> None:
        """Prints a plain line, if it is time for one."""
        progress, now = self.progress_state, time.monotonic()
        part = PLAIN_LINES * progress.step // max(1, progress.steps)
        is_due = part != self._last_line_part or now - self._last_line_at >= MAX_SILENT_SECONDS
        if is_evaluation:
            self._print_line(_evaluation_text(progress).plain)
        elif "loss" in progress.values and is_due:
            self._last_line_part, self._last_line_at = part, now
            steps, remaining = f"{progress.steps:,}", _remaining_text(progress)
            values = _value_texts(progress, PANEL_VALUES)
            parts = [f"step {progress.step:>{len(steps)},}/{steps}", *map(" ".join, values)]
            self._print_line("  ".join([*parts, remaining] if remaining else parts))

    def _print_line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _panel(self) -> RenderableType:
        progress = self.progress_state
        step, steps = progress.step, progress.steps
        percent = f"{100 * step / steps:.0f} %" if steps else ""
        bar = ProgressBar(max(1, steps), step, width=28, complete_style="green", finished_style="green")
        position = Text.assemble(("step ", "dim"), (f"{step:,}", "bold"), (f" / {steps:,}", "dim"))
        head = Table.grid(padding=(0, 2))
        head.add_row(position, bar, percent, Text(progress.evaluating or _remaining_text(progress), "dim"))
        rows: list[RenderableType] = [head]
        if values := _value_texts(progress):
            rows.append(Text("   ").join(Text.assemble((f"{name} ", "dim"), value) for name, value in values))
        if progress.first_round:
            rows.append(answers_table(progress.first_round, progress.values))
        elif jobs := progress.per_job():
            rows.append(_jobs_table(jobs))
        return Group(*rows)


def _remaining_text(progress: ProgressState) -> str:
    if progress.remaining is None or progress.step >= progress.steps:
        return ""
    return f"{format_duration(progress.remaining)} to go"


def _value_texts(progress: ProgressState, hidden: Collection[str] = ()) -> list[tuple[str, str]]:
    """(name, text) of each value that is displayed of training. hidden: those that a line leaves out."""
    values = progress.values
    if samples_answers(values) and hidden:
        return answer_texts(values)
    shown: list[tuple[str, str]] = []
    for key, name in NAMED_VALUES.items():
        if isinstance(values.get(key), int | float):
            shown.append((name, format_number(values[key])))
        elif key in values:
            shown.append((name, "not finite"))
    for key, value in values.items():  # what an objective measures
        is_known = key in UNNAMED_VALUES | NAMED_VALUES.keys() | COST_VALUES or key.startswith("train_")
        is_known = is_known or key in hidden or samples_answers(values)  # which a table has
        if not is_known and "/" not in key and isinstance(value, int | float | None):
            shown.append((key.replace("_", " "), format_number(value)))
    tokens, per_second, memory = values.get("tokens"), values.get("tokens_per_second"), values.get("memory")
    if isinstance(tokens, int | float):
        speed = f" at {format_count(per_second)}/s" if isinstance(per_second, int | float) else ""
        shown.append((progress.unit, format_count(tokens) + speed))
    if isinstance(memory, int | float) and memory > 0:
        shown.append(("memory", format_bytes(memory)))
    shown.append(("time", format_duration(progress.elapsed)))
    return shown


def _evaluation_text(progress: ProgressState) -> Text:
    """One line of history."""
    metrics = [
        Text.assemble((f"{name.replace('_', ' ')} ", "dim"), format_number(value))
        for name, value in progress.evaluation.items()
    ]
    start = Text.assemble(("step ", "dim"), f"{progress.evaluation_step:,}", "  ", ("validation", "bold"), "  ")
    return start + Text("  ").join(metrics)


def _jobs_table(jobs: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for values in jobs.values() for name in values))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("adapter")
    for name in names:
        table.add_column({"learning_rate": "lr"}.get(name, name), justify="right")
    for job, values in jobs.items():
        table.add_row(Text(job), *(format_number(values[name]) if name in values else "" for name in names))
    return table
