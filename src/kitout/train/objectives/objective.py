"""What an objective is: items to a batch, a model's answer to a loss, and what an answer predicts.

One file each: `causal`, `seq2seq`, `labels`, `tagging`, `pictures`. The loop asks for no more than this, so it knows
neither texts nor labels. A loss is a weighted sum over examples: the loop chooses the weights, which is how several
adapters, micro-batches and processes come to the same normalisation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kitout.evaluate.metrics.registry import Task
from kitout.train.objectives.batch import Batch


@dataclass(frozen=True)
class Losses:
    """What a batch came to, by example."""

    total: Tensor
    """The weighted sum, with its gradient."""
    per_example: Tensor
    """[B]: each example's own summed loss."""
    num_correct: Tensor
    """[B]: right terms."""
    num_targets: Tensor
    """[B]: terms."""
    logits: Tensor | None = None
    """[B, C], where an example has one answer, which is read off it: so a measurement runs the model once."""


class Objective(Protocol):
    """One kind of learning over one kind of example."""

    task: Task  # what `kitout.evaluate.metrics.registry` scores predictions by

    @property
    def batch_key(self) -> Hashable:
        """Jobs whose objectives have the same form may share a forward, row by row; None: with no other job."""
        ...

    def num_tokens(self, item: Any) -> int:
        """What an example costs: tokens, or 1."""
        ...

    def num_targets(self, item: Any) -> int:
        """How many terms its loss is a sum of: learnt tokens, or 1."""
        ...

    def collate(self, items: Sequence[Any], seeds: Sequence[int] | None) -> Batch:
        """Examples as one batch. seeds: one each, of what is drawn anew each time (augmentation); None: nothing is."""
        ...

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        """weights [B]: of each term of each example."""
        ...

    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        """What the model makes of each example: a class, a number, classes of tokens; [] where it is text to write."""
        ...
