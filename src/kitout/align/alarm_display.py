"""Prints the alarms of a stage while it trains, as they come; those from before a resume are not printed again.

A callback for `transformers.Trainer`. What is wrong and what to write is `kitout.align.alarms`' business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kitout.align.alarms import AlarmWatch


@final
class AlarmDisplay(TrainerCallback):  # type: ignore[misc]  # transformers is typed in part
    """log: gets a line for each alarm. history: gives what was logged before training starts, step by step."""

    def __init__(
        self, watch: AlarmWatch, log: Callable[[str], None], history: Callable[[], Iterable[Mapping[str, Any]]]
    ) -> None:
        self.watch, self.log, self.history = watch, log, history

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for row in self.history() if state.global_step else ():
            if int(row.get("step", 0)) <= state.global_step:
                self.watch.update(int(row.get("step", 0)), row)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            for alarm in self.watch.update(state.global_step, logs or {}):
                self.log(f"alarm: {alarm}")
