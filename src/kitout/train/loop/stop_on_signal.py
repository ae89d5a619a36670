"""Ctrl-C and SIGTERM during training: the step in progress ends, a checkpoint is saved, then the run stops.

A second signal stops at once. The exception is KeyboardInterrupt with the signal's number, so whoever handles Ctrl-C
handles both. One process only: several would have to agree on the step. It knows no files and no jobs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from kitout.train.loop import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _raise_interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """SIGTERM is what Ctrl-C is, where nobody else handles it: a run cleans up and says how it goes on."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Notes a signal, and acts on it where a checkpoint can be saved."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Handles the signals while inside; only the main thread can, and handlers of others are left alone."""
        self.signal_number = None
        if threading.current_thread() is not threading.main_thread() or distributed.world_size() > 1:
            yield
            return
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        default = (signal.SIG_DFL, signal.default_int_handler)
        own = [number for number, handler in handlers.items() if handler in default or handler is _raise_interrupt]
        for number in own:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number in own:
                signal.signal(number, handlers[number])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt(number)
        self.signal_number = number
        text = f"\n{signal.Signals(number).name}: stops after this step, with a checkpoint; once more: at once\n"
        os.write(2, text.encode())  # not by print, in the middle of which the signal may have come

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.signal_number is not None and state.global_step < state.max_steps:
            control.should_save = True
        return control

    def on_save(self, *_: Any, **__: Any) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt(self.signal_number)
