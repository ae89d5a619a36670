"""What is seen while a run trains: one live panel on a terminal, plain lines anywhere else, metrics.jsonl always.

A callback for `transformers.Trainer` (with disable_tqdm and without its own printers). Only the main process shows and
writes. It takes what the trainer logs as it comes: no key is needed, none it does not know is lost from the file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from kitout.train.metrics_log import METRICS_FILE, MetricsLog

PLAIN_LINES = 20  # plain lines of a run, beside first, last and measurements ...
MAX_SILENT_SECONDS = 300.0  # ... and no longer without one than so many seconds
FRAMES_PER_SECOND = 4  # a second, on a terminal
EVAL_PREFIX = "eval_"
HIDDEN_SUFFIXES = ("runtime", "_per_second", "model_preparation_time")  # endings of what Trainer adds to a measurement


@dataclass
class ProgressState:
    """The last value of everything that is shown, and where the run is."""

    step: int = 0
    steps: int = 0
    first_step: int = 0  # step at which this process began
    start_time: float = field(default_factory=time.monotonic)
    values: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    evaluation_step: int = 0
    evaluating: str = ""
    batches: int = 0  # of the measurement under way

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start_time

    @property
    def remaining(self) -> float | None:
        """Seconds to go, measurements and checkpoints reckoned in as they have come so far."""
        done = self.step - self.first_step
        return self.elapsed / done * (self.steps - self.step) if done > 0 and self.steps else None

    def update(self, step: int, logs: Mapping[str, Any]) -> bool:
        """Takes over what was logged; True if it was a measurement."""
        self.step = step
        new = {
            name.removeprefix(EVAL_PREFIX): value
            for name, value in logs.items()
            if name.startswith(EVAL_PREFIX) and not name.endswith(HIDDEN_SUFFIXES)
        }
        if new:
            self.evaluation, self.evaluation_step = new, step
            self.evaluating, self.batches = "", 0
        self.values |= {name: value for name, value in logs.items() if not name.startswith(EVAL_PREFIX)}
        return bool(new)

    def per_job(self) -> dict[str, dict[str, Any]]:
        """Of several adapters trained at once: "<job>/<value>"."""
        found: dict[str, dict[str, Any]] = {}
        for name, value in self.values.items():
            job, slash, what = name.rpartition("/")
            if slash:
                found.setdefault(job, {})[what] = value
        return found


def console_draws(console: Console) -> bool:
    """Whether lines can be drawn over; a pipe, a file, a notebook and a dumb terminal cannot."""
    return console.is_terminal and not console.is_dumb_terminal


@final
class ProgressDisplay(TrainerCallback):  # type: ignore[misc]  # transformers' types are half there
    """folder: of the run, for metrics.jsonl. A context manager, so that a fault leaves the terminal in order."""

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self.metrics = MetricsLog(folder / METRICS_FILE)
        self.progress_state = ProgressState()
        self._live: Live | None = None
        self._plain = not console_draws(self.console)
        self._last_line_part, self._last_line_at = -1, 0.0

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as any other program finds it."""
        if self._live is not None:
            self._live.update(self._panel())
            self._live.stop()
            self._live = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        at = state.global_step
        self.metrics.resume_at(at)
        self.progress_state = ProgressState(
            at,
            state.max_steps,
            at,
            evaluation=self.progress_state.evaluation,
            evaluation_step=self.progress_state.evaluation_step,
        )
        if not self._plain:
            # It is drawn when there is something new, never by a thread of its own: that would stutter in forwards.
            self._live = Live(self._panel(), console=self.console, auto_refresh=False, transient=False)
            self._live.start(refresh=True)
        elif at:
            self._print_line(f"goes on after step {at:,} of {state.max_steps:,}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress_state.step, self.progress_state.batches = state.global_step, 0
            self.progress_state.evaluating = (
                "measuring ..." if control.should_evaluate else ""
            )  # what follows may take a while
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
        measured = self.progress_state.update(state.global_step, line)
        if self._live is not None:
            self._draw(force=measured)
            if measured:  # stays above the panel: the run's history
                self._live.console.print(_evaluation_text(self.progress_state), soft_wrap=True)
        elif self._plain:
            self._log_line(measured)

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
            self.progress_state.evaluating = f"measuring, batch {self.progress_state.batches:,} ..."
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
            self._print_line(
                f"trained: {self.progress_state.step - self.progress_state.first_step:,} steps in "
                f"{format_duration(self.progress_state.elapsed)}"
            )

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._live is not None and (force or now - self._last_line_at >= 1 / FRAMES_PER_SECOND):
            self._last_line_at = now
            self._live.update(self._panel(), refresh=True)

    def _log_line(self, is_evaluation: bool) -> None:
        """A plain line, if it is time for one."""
        seen, now = self.progress_state, time.monotonic()
        part = PLAIN_LINES * seen.step // max(1, seen.steps)
        if is_evaluation:
            self._print_line(_evaluation_text(seen).plain)
        elif "loss" in seen.values and (part != self._last_line_part or now - self._last_line_at >= MAX_SILENT_SECONDS):
            self._last_line_part, self._last_line_at = part, now
            left = (
                ""
                if seen.remaining is None or seen.step >= seen.steps
                else f"  {format_duration(seen.remaining)} to go"
            )
            steps = f"{seen.steps:,}"
            self._print_line(
                f"step {seen.step:>{len(steps)},}/{steps}  " + "  ".join(map(" ".join, _value_rows(seen))) + left
            )

    def _print_line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _panel(self) -> RenderableType:
        seen = self.progress_state
        head = Table.grid(padding=(0, 2))
        share = f"{100 * seen.step / seen.steps:.0f} %" if seen.steps else ""
        left = "" if seen.remaining is None or seen.step >= seen.steps else f"{format_duration(seen.remaining)} to go"
        bar = ProgressBar(max(1, seen.steps), seen.step, width=28, complete_style="green", finished_style="green")
        where = Text.assemble(("step ", "dim"), (f"{seen.step:,}", "bold"), (f" / {seen.steps:,}", "dim"))
        head.add_row(where, bar, share, Text(seen.evaluating or left, "dim"))
        rows: list[RenderableType] = [head]
        if values := _value_rows(seen):
            rows.append(Text("   ").join(Text.assemble((f"{name} ", "dim"), value) for name, value in values))
        if jobs := seen.per_job():
            rows.append(_jobs_table(jobs))
        return Group(*rows)


def _value_rows(progress_state: ProgressState) -> list[tuple[str, str]]:
    """What is shown of a training step, named and in words."""
    values = progress_state.values
    shown: list[tuple[str, str]] = []
    for name, key in (("loss", "loss"), ("lr", "learning_rate"), ("gradient", "grad_norm")):
        if isinstance(values.get(key), int | float):
            shown.append((name, format_number(values[key])))
        elif key in values:
            shown.append((name, "not finite"))
    tokens, pace, memory = values.get("tokens"), values.get("tokens_per_second"), values.get("memory")
    if isinstance(tokens, int | float):
        each = f" at {format_count(pace)}/s" if isinstance(pace, int | float) else ""
        shown.append(("tokens", format_count(tokens) + each))
    if isinstance(memory, int | float) and memory > 0:
        shown.append(("memory", format_bytes(memory)))
    shown.append(("time", format_duration(progress_state.elapsed)))
    return shown


def _evaluation_text(progress_state: ProgressState) -> Text:
    """One line of history."""
    parts = [
        Text.assemble((f"{name.replace('_', ' ')} ", "dim"), format_number(v))
        for name, v in progress_state.evaluation.items()
    ]
    return Text.assemble(
        ("step ", "dim"), f"{progress_state.evaluation_step:,}", "  ", ("validation", "bold"), "  "
    ) + Text("  ").join(parts)


def _jobs_table(jobs: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(what for values in jobs.values() for what in values))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("adapter")
    for what in names:
        table.add_column({"learning_rate": "lr"}.get(what, what), justify="right")
    for job, values in jobs.items():
        table.add_row(Text(job), *(format_number(values[what]) if what in values else "" for what in names))
    return table
