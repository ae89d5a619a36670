"""The confusion matrix: how often each true class was predicted as which.

Of one class per example (of a classifier, of images, of a language model's closed set of answers), and of tagged words,
where B- and I- of a type are one class. Several labels per example have none. It knows no text and no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Confusion:
    """Counts by true and predicted class. (The names are keys of results.json.)"""

    names: tuple[str, ...]
    """The classes that are in the references or the predictions, in order."""
    counts: tuple[tuple[int, ...], ...]
    """[true class][predicted class]; examples, or words of tagged texts."""

    @property
    def total(self) -> int:
        """All examples."""
        return sum(map(sum, self.counts))

    @property
    def correct(self) -> int:
        """Those on the diagonal."""
        return sum(row[i] for i, row in enumerate(self.counts))

    def errors(self, limit: int) -> list[tuple[str, str, int, int]]:
        """The largest counts off the diagonal: (true, predicted, how often, of how many of that true class)."""
        found = [
            (self.names[i], self.names[k], count, sum(row))
            for i, row in enumerate(self.counts)
            for k, count in enumerate(row)
            if i != k and count
        ]
        return sorted(found, key=lambda one: -one[2])[:limit]


def confusion_matrix(
    task: str, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str]
) -> Confusion | None:
    """As `class_scores` takes them: classification (indices into the names, or names) or tokens (rows of indices).

    None for every other task, and where there is nothing to count.
    """
    if task == "tokens":
        classes = [name.partition("-")[2] if name.startswith(("B-", "I-")) else name for name in names]
        pairs = Counter(
            (classes[true], classes[found])
            for row, found_row in zip(references, predictions, strict=True)
            for true, found in zip(row, found_row, strict=True)
        )
    elif task == "classification":
        classes = list(names)
        titles: dict[Hashable, str] = {**dict(enumerate(names)), **{name: name for name in names}}
        pairs = Counter(
            (titles.get(true, str(true)), titles.get(found, str(found)))
            for true, found in zip(references, predictions, strict=True)
        )
    else:
        return None
    seen = {name for pair in pairs for name in pair}
    shown = tuple(name for name in dict.fromkeys([*classes, *sorted(seen)]) if name in seen)
    counts = tuple(tuple(pairs[true, found] for found in shown) for true in shown)
    return Confusion(shown, counts) if shown else None
