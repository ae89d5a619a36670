"""What looks wrong about labels, and what was remarked of examples: one sentence each, for the pre-flight.

Labels that differ by case or white space alone, a label with one example, a label that is no number ("inf"); and the
remarks of readers and encoders, counted, with the place of the first. It knows counts and examples, no file and no
tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from kitout.data.normalize import normalize_text

MAX_SHOWN = 5  # labels named in one warning
MAX_SINGLE_LABELS = 10  # more labels with one example each are suspicious


class Remarked(Protocol):
    """An example, read or encoded."""

    @property
    def remarks(self) -> tuple[str, ...]: ...
    @property
    def location(self) -> str: ...


def warn_of_remarks(name: str, examples: Iterable[Remarked]) -> Iterator[str]:
    """Each remark once, with how many examples of the split have it. name: of the split."""
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    total = 0
    for example in examples:
        total += 1
        for remark in dict.fromkeys(example.remarks):
            first.setdefault(remark, example.location)
            counts[remark] = counts.get(remark, 0) + 1
    for remark, count in counts.items():
        place = f" (the first: {first[remark]})" if first[remark] else ""
        yield f"{name}: {count:,} of {total:,} examples: {remark}{place}"


def warn_of_labels(counts: Mapping[str, int], are_rows: bool) -> Iterator[str]:
    """counts: examples of each label in the train split. are_rows: counted are examples, not tokens."""
    groups: dict[str, list[str]] = {}
    for label in counts:
        groups.setdefault(normalize_text(label), []).append(label)
    alike = [labels for labels in groups.values() if len(labels) > 1]
    if alike:
        shown = ", ".join(" and ".join(map(repr, labels)) for labels in alike[:MAX_SHOWN])
        yield f"train: labels that differ by case or white space alone are different classes: {shown}: are they one?"
    not_finite = [label for label in counts if not _is_finite(label)]
    if not_finite:
        yield f"train: {', '.join(map(repr, not_finite))} is a class of its own: is it a number that is missing?"
    present = [label for label, count in counts.items() if count]
    single = [label for label in present if counts[label] == 1]
    if len(single) > max(MAX_SINGLE_LABELS, len(present) / 2):
        yield (
            f"train: {len(single):,} of {len(present):,} labels have one example each: is the label in another column?"
        )
    elif single and are_rows:
        shown = ", ".join(map(repr, single[:MAX_SHOWN])) + (", ..." if len(single) > MAX_SHOWN else "")
        noun = "a label has" if len(single) == 1 else f"{len(single):,} labels have"
        yield f"train: {noun} one example ({shown}): too few to learn it from, and none is left to test it on"


def _is_finite(label: str) -> bool:
    """False for inf and nan, however they are written; words are no numbers."""
    try:
        return math.isfinite(float(label))
    except ValueError:
        return True
