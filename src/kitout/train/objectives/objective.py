"""What an objective is: examples to a batch, a model's output to a loss, and what an output predicts.

One file each, one entry each in `tasks`. The loop asks for no more than this, so it knows neither texts nor labels. A
loss is a weighted sum over examples: the loop chooses the weights, which is how several adapters, micro-batches and
processes come to the same normalization.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from kitout.evaluate.metrics.registry import Task


@dataclass(frozen=True)
class Batch:
    """Examples as a model takes them. Padding is marked by the attention mask alone, so any token may fill it."""

    inputs: dict[str, Any]
    """What the model is called with."""
    targets: dict[str, Tensor]
    """What its output is compared with."""
    num_examples: int
    """Examples, in their order."""
    num_tokens: int
    """Tokens without padding."""
    num_padded_tokens: int = 0
    """Tokens with padding."""
    token_index: Tensor | None = None
    """[N]: where the tokens are in the flattened [B * T], example by example; None: in order, by the mask."""


@dataclass(frozen=True)
class Losses:
    """The losses of a batch, by example."""

    total: Tensor
    """The weighted sum, with its gradient."""
    per_example: Tensor
    """[B]: each example's own summed loss."""
    num_correct: Tensor
    """[B]: correct terms."""
    num_targets: Tensor
    """[B]: terms."""
    logits: Tensor | None = None
    """[B, C], where an example has one answer, which is read off it: so an evaluation runs the model once."""
    metrics: Mapping[str, Tensor] | None = field(default=None, kw_only=True)
    """By name (without "/" or "eval_") [B]: values of each example, without gradient, whose means a run logs. nan: the
    example has no such value, and is left out of the mean."""
    rewards: Tensor | None = field(default=None, kw_only=True)
    """[B] or [B, 2], without gradient, where a prediction is a reward that the loss has anyway: as with `logits`, an
    evaluation runs the model once."""


class Objective(Protocol):
    """One kind of loss over one kind of example."""

    task: Task  # what `kitout.evaluate.metrics.registry` scores predictions by
    rows: int  # of the model's batch that one example takes, next to each other; 1, or 2 for a pair

    @property
    def batch_key(self) -> Hashable:
        """Jobs whose objectives have the same key may share a forward, row by row; None: with no other job."""
        ...

    def num_tokens(self, item: Any) -> int:
        """What an example costs: tokens, or 1."""
        ...

    def num_targets(self, item: Any) -> int:
        """How many terms its loss is a sum of: target tokens, or 1."""
        ...

    def collate(self, items: Sequence[Any], seeds: Sequence[int] | None) -> Batch:
        """Examples as one batch of `rows` rows each. seeds: one per example, for random augmentation; None: none."""
        ...

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        """weights [B]: of each term of each example."""
        ...

    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        """What the model predicts for each example: a class, a number, classes of tokens; [] where it writes text."""
        ...


@runtime_checkable
class LabelObjective(Protocol):
    """An objective over a closed set of labels, or over numbers: its predictions are read off logits."""

    def collate(self, items: Sequence[Any], seeds: Sequence[int] | None) -> Batch:
        """As `Objective.collate`."""
        ...

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """[B, C], or [B, T, C] of tokens."""
        ...


@runtime_checkable
class LanguageObjective(Protocol):
    """An objective over the vocabulary, which looks for the cheapest exact way to its loss before training."""

    def choose_head_loss(self, names: Sequence[str], items: Sequence[Any]) -> None:
        """names: adapters of the run. items: a few examples to try the ways on."""
        ...


@runtime_checkable
class StepObjective(Protocol):
    """An objective whose losses need something of the whole step before its first micro-batch, as KTO's baseline."""

    def before_step(self, model: Any, items: Sequence[Any], step: int) -> None:
        """Called once per optimizer step. items: all of the step, in every process the same.

        The job's adapter is active and in training mode, no gradient is recorded, and random draws follow from the seed
        and the step. It cuts the items into forwards itself.
        """
        ...
