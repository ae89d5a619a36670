"""The adapters of one run side by side: the metric of each on the test split, and its cost.

Plain values for the report and for results.json, and the same as lines of text. Adapters whose intervals overlap are
named, so that nobody reads an order into noise. It knows no model, no training and no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kitout.evaluate.compare import format_value
from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.metrics.registry import TITLES


@dataclass(frozen=True)
class AdapterRow:
    """One adapter of a run."""

    name: str
    """The adapter's name."""
    method: str
    """Its method, with settings."""
    metric: str
    """The headline metric, by its key in `TITLES`; empty without a test split."""
    score: Score | None
    """That metric with its interval."""
    trainable: int
    """Trainable parameters, heads included."""
    percent: float
    """Trainable parameters in percent of the base's."""
    examples: int
    """Training examples, repeats counted."""
    seconds: float
    """Wall time of its forward and backward passes."""
    processor_seconds: float
    """Processor time of the same, summed over all threads."""

    @property
    def title(self) -> str:
        """The metric's name for readers."""
        return TITLES.get(self.metric, self.metric)

    @property
    def score_text(self) -> str:
        """93.6 (91.9 to 95.0); fractions in percent."""
        if self.score is None:
            return ""
        value, low, high = (
            format_value(v, self.score.share) for v in (self.score.value, self.score.low, self.score.high)
        )
        return f"{value} ({low} to {high})"

    @property
    def percent_text(self) -> str:
        """% trainable, as text."""
        return f"{self.percent:.2f}" if self.percent < 99.995 else "100"


def best(rows: Sequence[AdapterRow]) -> AdapterRow:
    """The one with the best headline metric; of equal ones, that with the fewest trainable parameters."""

    def rank(row: AdapterRow) -> tuple[float, int]:
        assert row.score is not None
        return (row.score.value if row.score.higher_is_better else -row.score.value), -row.trainable

    return max((row for row in rows if row.score is not None), key=rank)


def comparable(rows: Sequence[AdapterRow]) -> bool:
    """Whether all of them have the same metric."""
    return None not in [row.score for row in rows] and len({row.metric for row in rows}) == 1


def verdict(rows: Sequence[AdapterRow], same_test: bool = True) -> str:
    """Which adapter is best, and whose interval overlaps its own. same_test: all have the same test examples."""
    if not same_test:
        return "each adapter has its own test split: the metrics are not comparable"
    top = best(rows)
    assert top.score is not None
    if len(rows) == 1:
        return f"{top.name}: {top.title} {top.score_text}"
    overlapping = [
        row.name for row in rows
        if row is not top and row.score is not None and row.score.low <= top.score.high
        and top.score.low <= row.score.high
    ]  # fmt: skip
    caveat = f"; intervals overlap with {', '.join(overlapping)}: not significant on {top.score.n:,} test examples"
    return f"best: {top.name}, {top.title} {top.score_text}{caveat if overlapping else ''}"


def text(rows: Sequence[AdapterRow], majority: float | None, same_test: bool = True) -> str:
    """The table as aligned lines, the verdict below. majority: accuracy of always predicting the majority class."""
    title = f"{rows[0].title}{' %' if rows[0].score and rows[0].score.share else ''}, 95 % interval"
    lines = [["adapter", "trainable", "%", title, "train s", "processor s", "s/example"]]
    for row in rows:
        per_example = f"{row.seconds / max(1, row.examples):.3f}"
        cost = [f"{row.seconds:.0f}", f"{row.processor_seconds:.0f}", per_example]
        lines.append([row.name, f"{row.trainable:,}", row.percent_text, row.score_text, *cost])
    if same_test and majority is not None and rows[0].metric == "accuracy":
        lines.append(["majority class", "0", "0", f"{100 * majority:.1f}", "", "", ""])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    aligned = [
        "  ".join(cell.ljust(width) if k in (0, 3) else cell.rjust(width)
                  for k, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]  # fmt: skip
    return "\n".join([*aligned, "", verdict(rows, same_test)])
