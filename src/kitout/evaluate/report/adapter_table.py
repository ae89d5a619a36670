"""The adapters of one run side by side: the metric of each on the test split, and its cost.

Plain values for the report and for results.json, and the same as lines of text. No adapter is named the best: one run
of each says nothing of other seeds. It knows no model, no training and no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kitout.evaluate.compare import format_value
from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.significance.power import SmallestDifference, smallest_text
from kitout.format import format_bytes


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
    memory: int
    """Bytes that it takes in training besides the base: parameters, gradients and the optimizer's state."""
    tokens: int | None = None
    """Tokens without padding (or images) that it was trained on, repeats counted; None: they were not kept."""

    @property
    def title(self) -> str:
        """The metric's name for readers."""
        return metric_title(self.metric, self.score.note if self.score else "")

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


def comparable(rows: Sequence[AdapterRow]) -> bool:
    """Whether all of them have the same metric."""
    return None not in [row.score for row in rows] and len({row.metric for row in rows}) == 1


def caption(
    rows: Sequence[AdapterRow], same_test: bool = True, smallest: SmallestDifference | None = None,
    has_seeds: bool = False,
) -> str:  # fmt: skip
    """What the table shows, and what it does not. same_test: all have the same test examples. smallest: what these can
    show of any two adapters. has_seeds: several adapters are one method, and another table has the verdicts.

    It names no best adapter: intervals are over test examples, and another seed moves each result too.
    """
    if not same_test:
        return "each adapter has its own test split: the metrics are not comparable"
    scores = [row.score for row in rows if row.score is not None]
    if len(rows) == 1:
        return f"{rows[0].name}: {rows[0].title} {rows[0].score_text}"
    low, high = (format_value(choose(s.value for s in scores), scores[0].share) for choose in (min, max))
    if has_seeds:
        return f"{rows[0].title} {low} to {high} on {scores[0].n:,} test examples, one seed each"
    return (
        f"{rows[0].title} {low} to {high} on {scores[0].n:,} test examples, one seed each: the intervals hold for "
        "these examples, and another seed moves every result too. To compare methods, repeat them with other seeds "
        f"(train.seed){f'; {smallest_text([(rows[0].title, smallest)])}' if smallest else ''}"
    )


def text(
    rows: Sequence[AdapterRow], majority: float | None, same_test: bool = True,
    smallest: SmallestDifference | None = None, has_seeds: bool = False,
) -> str:  # fmt: skip
    """The table as aligned lines, the caption below. majority: accuracy of always predicting the majority class."""
    title = f"{rows[0].title}{' %' if rows[0].score and rows[0].score.share else ''}, 95 % interval"
    lines = [["adapter", "trainable", "%", title, "train s", "processor s", "s/example", "memory"]]
    for row in rows:
        per_example = f"{row.seconds / max(1, row.examples):.3f}"
        cost = [f"{row.seconds:.0f}", f"{row.processor_seconds:.0f}", per_example, format_bytes(row.memory)]
        lines.append([row.name, f"{row.trainable:,}", row.percent_text, row.score_text, *cost])
    if same_test and majority is not None and rows[0].metric == "accuracy":
        lines.append(["majority class", "0", "0", f"{100 * majority:.1f}", "", "", "", ""])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    aligned = [
        "  ".join(cell.ljust(width) if k in (0, 3) else cell.rjust(width)
                  for k, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]  # fmt: skip
    return "\n".join([*aligned, "", caption(rows, same_test, smallest, has_seeds)])
