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

from kitout.format import amount, figure, seconds, size
from kitout.train.metrics_log import FILE, Metrics

PARTS = 20  # plain lines of a run, beside first, last and measurements ...
SILENCE = 300.0  # ... and no longer without one than so many seconds
FRAMES = 4  # a second, on a terminal
MEASURED = "eval_"
NOT_SHOWN = ("runtime", "_per_second", "model_preparation_time")  # endings of what Trainer adds to a measurement


@dataclass
class Seen:
    """The last value of everything that is shown, and where the run is."""

    step: int = 0
    steps: int = 0
    first: int = 0  # step at which this process began
    started: float = field(default_factory=time.monotonic)
    values: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    measured_at: int = 0
    measuring: str = ""
    batches: int = 0  # of the measurement under way

    @property
    def gone(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds to go, measurements and checkpoints reckoned in as they have come so far."""
        done = self.step - self.first
        return self.gone / done * (self.steps - self.step) if done > 0 and self.steps else None

    def take(self, step: int, logs: Mapping[str, Any]) -> bool:
        """Takes over what was logged; True if it was a measurement."""
        self.step = step
        new = {
            name.removeprefix(MEASURED): value
            for name, value in logs.items()
            if name.startswith(MEASURED) and not name.endswith(NOT_SHOWN)
        }
        if new:
            self.measured, self.measured_at = new, step
            self.measuring, self.batches = "", 0
        self.values |= {name: value for name, value in logs.items() if not name.startswith(MEASURED)}
        return bool(new)

    def jobs(self) -> dict[str, dict[str, Any]]:
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
class Progress(TrainerCallback):  # type: ignore[misc]  # transformers' types are half there
    """folder: of the run, for metrics.jsonl. A context manager, so that a fault leaves the terminal in order."""

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self.metrics = Metrics(folder / FILE)
        self.seen = Seen()
        self._live: Live | None = None
        self._plain = not console_draws(self.console)
        self._told_part, self._told_at = -1, 0.0

    def __enter__(self) -> Progress:
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
        self.metrics.begin(at)
        self.seen = Seen(at, state.max_steps, at, measured=self.seen.measured, measured_at=self.seen.measured_at)
        if not self._plain:
            # It is drawn when there is something new, never by a thread of its own: that would stutter in forwards.
            self._live = Live(self._panel(), console=self.console, auto_refresh=False, transient=False)
            self._live.start(refresh=True)
        elif at:
            self._say(f"goes on after step {at:,} of {state.max_steps:,}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.seen.step, self.seen.batches = state.global_step, 0
            self.seen.measuring = "measuring ..." if control.should_evaluate else ""  # what follows may take a while
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
        measured = self.seen.take(state.global_step, line)
        if self._live is not None:
            self._draw(force=measured)
            if measured:  # stays above the panel: the run's history
                self._live.console.print(_measured(self.seen), soft_wrap=True)
        elif self._plain:
            self._tell(measured)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self.seen.batches += 1
            self.seen.measuring = f"measuring, batch {self.seen.batches:,} ..."
            self._draw()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.seen.values["saved"] = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.seen.step = state.global_step
        self.close()
        if self._plain:
            self._say(f"trained: {self.seen.step - self.seen.first:,} steps in {seconds(self.seen.gone)}")

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._live is not None and (force or now - self._told_at >= 1 / FRAMES):
            self._told_at = now
            self._live.update(self._panel(), refresh=True)

    def _tell(self, measured: bool) -> None:
        """A plain line, if it is time for one."""
        seen, now = self.seen, time.monotonic()
        part = PARTS * seen.step // max(1, seen.steps)
        if measured:
            self._say(_measured(seen).plain)
        elif "loss" in seen.values and (part != self._told_part or now - self._told_at >= SILENCE):
            self._told_part, self._told_at = part, now
            left = "" if seen.left is None or seen.step >= seen.steps else f"  {seconds(seen.left)} to go"
            steps = f"{seen.steps:,}"
            self._say(f"step {seen.step:>{len(steps)},}/{steps}  " + "  ".join(map(" ".join, _values(seen))) + left)

    def _say(self, words: str) -> None:
        self.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def _panel(self) -> RenderableType:
        seen = self.seen
        head = Table.grid(padding=(0, 2))
        share = f"{100 * seen.step / seen.steps:.0f} %" if seen.steps else ""
        left = "" if seen.left is None or seen.step >= seen.steps else f"{seconds(seen.left)} to go"
        bar = ProgressBar(max(1, seen.steps), seen.step, width=28, complete_style="green", finished_style="green")
        where = Text.assemble(("step ", "dim"), (f"{seen.step:,}", "bold"), (f" / {seen.steps:,}", "dim"))
        head.add_row(where, bar, share, Text(seen.measuring or left, "dim"))
        rows: list[RenderableType] = [head]
        if values := _values(seen):
            rows.append(Text("   ").join(Text.assemble((f"{name} ", "dim"), value) for name, value in values))
        if jobs := seen.jobs():
            rows.append(_jobs_table(jobs))
        return Group(*rows)


def _values(seen: Seen) -> list[tuple[str, str]]:
    """What is shown of a training step, named and in words."""
    values = seen.values
    shown: list[tuple[str, str]] = []
    for name, key in (("loss", "loss"), ("lr", "learning_rate"), ("gradient", "grad_norm")):
        if isinstance(values.get(key), int | float):
            shown.append((name, figure(values[key])))
        elif key in values:
            shown.append((name, "not finite"))
    tokens, pace, memory = values.get("tokens"), values.get("tokens_per_second"), values.get("memory")
    if isinstance(tokens, int | float):
        each = f" at {amount(pace)}/s" if isinstance(pace, int | float) else ""
        shown.append(("tokens", amount(tokens) + each))
    if isinstance(memory, int | float) and memory > 0:
        shown.append(("memory", size(memory)))
    shown.append(("time", seconds(seen.gone)))
    return shown


def _measured(seen: Seen) -> Text:
    """One line of history."""
    parts = [Text.assemble((f"{name.replace('_', ' ')} ", "dim"), figure(v)) for name, v in seen.measured.items()]
    return Text.assemble(("step ", "dim"), f"{seen.measured_at:,}", "  ", ("validation", "bold"), "  ") + Text(
        "  "
    ).join(parts)


def _jobs_table(jobs: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(what for values in jobs.values() for what in values))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("adapter")
    for what in names:
        table.add_column({"learning_rate": "lr"}.get(what, what), justify="right")
    for job, values in jobs.items():
        table.add_row(Text(job), *(figure(values[what]) if what in values else "" for what in names))
    return table
