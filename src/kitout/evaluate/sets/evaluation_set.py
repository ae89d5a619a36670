"""What is measured on: a set of examples that can be asked of a kit, and gives metrics of what it answered.

Each kind asks, keeps its answers as plain values (so that they can be stored), and makes measures of them. This file
has what all kinds have in common. It knows no kind, no source and no report.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.sets.base_digest import digest_of_values
from kitout.kit import Kit
from kitout.route import RouteEntry

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What is asked, and how."""

    kit: Kit
    """The base with its adapters."""
    tokenizer: Any
    """The model's own; None: it reads images."""
    pad_token_id: int | None
    """The id rows are padded with; None: of images."""
    max_new_tokens: int | None = None
    """Of a generated answer; None: by the references."""

    @cached_property
    def base_digest(self) -> str | None:
        """Of the base's values, read once; None where they cannot be read."""
        return digest_of_values(self.kit.base)


class EvaluationSet(Protocol):
    """One set of examples; `answers` of a model are plain values, which json can hold."""

    @property
    def name(self) -> str:
        """As the source names it."""
        ...

    @property
    def kind(self) -> str:
        """choice, text, or the name of a task."""
        ...

    @property
    def groups(self) -> tuple[str, ...]:
        """Of each example, where examples of a group are not independent; empty: every one stands for itself."""
        ...

    @property
    def digest(self) -> str:
        """Of everything that its answers depend on, besides the model."""
        ...

    @property
    def shares_batches(self) -> bool:
        """Whether several routes are asked in the same batches, which is faster than one after the other."""
        ...

    def __len__(self) -> int:
        """Examples."""
        ...

    def ask(self, asked: Asked, routes: Sequence[RouteEntry], on_progress: ProgressFn | None) -> list[Any]:
        """The answers under each route; None is the base."""
        ...

    def constant(self) -> tuple[str, Any] | None:
        """What stands in for a base whose head is untrained: its name, and the same answer to every example."""
        ...

    def measures(self, answers: Any) -> dict[str, Measure]:
        """The metrics of one model's answers, the headline first."""
        ...


def grouped(
    measures: Mapping[str, Measure], groups: Sequence[str], answered: Sequence[str] = ()
) -> dict[str, Measure]:  # fmt: skip
    """The measures with their examples in groups; as they are where there are none.

    answered: the groups of those examples alone that an answer was generated for, the first of them.
    """
    if not groups:
        return dict(measures)
    return {
        name: measure.grouped(groups if measure.n == len(groups) else answered[: measure.n])
        for name, measure in measures.items()
    }


def sample(items: Sequence[T], number: int | None, seed: int) -> list[T]:
    """So many items, drawn by the seed, in their order."""
    if number is None or number >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), number))]


def digest_of(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, default=str).encode()).hexdigest()
