"""Several adapters of one run side by side: what each reached on the held-out part and what it cost.

Plain values for a report and for results.json, and the same as lines of text. Intervals that meet are named, so that
nobody reads an order into noise. It knows no model, no training and no page.
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
    """The headline metric, by its key in `TITLES`; empty without a test part."""
    score: Score | None
    """That metric with its interval."""
    trainable: int
    """Trained values, heads included."""
    percent: float
    """Of the base's values."""
    examples: int
    """Training examples it was shown, repeats counted."""
    seconds: float
    """Wall clock of its forwards and backwards."""
    processor_seconds: float
    """Processor time of the same, over all threads."""

    @property
    def title(self) -> str:
        """The metric in words."""
        return TITLES.get(self.metric, self.metric)

    @property
    def reached(self) -> str:
        """93.6 (91.9 to 95.0); shares in percent."""
        if self.score is None:
            return ""
        value, low, high = (
            format_value(v, self.score.share) for v in (self.score.value, self.score.low, self.score.high)
        )
        return f"{value} ({low} to {high})"

    @property
    def part(self) -> str:
        """The percentage of the base, in words."""
        return f"{self.percent:.2f}" if self.percent < 99.995 else "100"


def best(rows: Sequence[AdapterRow]) -> AdapterRow:
    """The one with the best headline metric; of equals the one with the fewest trained values."""

    def rank(row: AdapterRow) -> tuple[float, int]:
        assert row.score is not None
        return (row.score.value if row.score.higher_is_better else -row.score.value), -row.trainable

    return max((row for row in rows if row.score is not None), key=rank)


def comparable(rows: Sequence[AdapterRow]) -> bool:
    """Whether one metric measures all of them."""
    return None not in [row.score for row in rows] and len({row.metric for row in rows}) == 1


def verdict(rows: Sequence[AdapterRow], same_test: bool = True) -> str:
    """Which adapter is best, and which ones the test examples do not tell from it. same_test: all share these."""
    if not same_test:
        return "each adapter is measured on the test part of its own data: the figures are not of one kind"
    top = best(rows)
    assert top.score is not None
    if len(rows) == 1:
        return f"{top.name}: {top.title} {top.reached}"
    near = [
        row.name for row in rows
        if row is not top and row.score is not None and row.score.low <= top.score.high
        and top.score.low <= row.score.high
    ]  # fmt: skip
    meets = f"; its interval meets that of {', '.join(near)}: {top.score.n:,} examples do not tell these apart"
    return f"best: {top.name}, {top.title} {top.reached}{meets if near else ''}"


def text(rows: Sequence[AdapterRow], majority: float | None, same_test: bool = True) -> str:
    """The table as aligned lines, the verdict below. majority: the accuracy of always naming one class."""
    title = f"{rows[0].title}{' %' if rows[0].score and rows[0].score.share else ''}, 95 % interval"
    lines = [["adapter", "trained", "%", title, "train s", "processor s", "s/example"]]
    for row in rows:
        each = f"{row.seconds / max(1, row.examples):.3f}"
        took = [f"{row.seconds:.0f}", f"{row.processor_seconds:.0f}", each]
        lines.append([row.name, f"{row.trainable:,}", row.part, row.reached, *took])
    if same_test and majority is not None and rows[0].metric == "accuracy":
        lines.append(["most frequent class", "0", "0", f"{100 * majority:.1f}", "", "", ""])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    shown = [
        "  ".join(cell.ljust(width) if k in (0, 3) else cell.rjust(width)
                  for k, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]  # fmt: skip
    return "\n".join([*shown, "", verdict(rows, same_test)])
