"""Examples that are made while training: what the loop asks of whoever makes them.

Answers that the model itself writes, for example. The jobs' examples are a list that is filled anew, so the plan of a
run (which step takes which indices) stands before the first step all the same. It knows steps, no texts and no rewards.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class StepData(Protocol):
    """Makes what the jobs train on while they train: their examples are its own, filled anew before a step."""

    def before_step(self, step: int) -> None:
        """Fills the examples of the jobs for this step, where it begins a new round of them."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to log of the last round."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """For a checkpoint: plain values, and the tensors of the round in progress."""
        ...

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Takes a checkpoint's state over."""
        ...
