"""One row of the table: a run, or several of one configuration whose seeds alone differ.

It knows finished runs, and no other row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean

from kitout.compare.finished_runs import FinishedRun
from kitout.evaluate.compare import format_value
from kitout.evaluate.metrics.measure import Score


@dataclass(frozen=True)
class RunRow:
    """One run, or several of one configuration with different seeds."""

    label: str
    """What the table calls it."""
    runs: tuple[FinishedRun, ...]
    """The runs behind it; several: only their seeds differ."""
    test: str
    """A letter: rows of the same letter were measured on the same test examples; empty without a test split."""

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seeds of its runs; None where a run does not say."""
        return tuple(run.seed for run in self.runs)

    @property
    def seconds(self) -> float | None:
        """Of training, the mean over its runs; None where that is not kept."""
        known = [run.seconds for run in self.runs if run.seconds is not None]
        return fmean(known) if len(known) == len(self.runs) else None

    @property
    def memory(self) -> int:
        """The highest peak of its runs, in bytes."""
        return max(run.memory for run in self.runs)

    @property
    def forgetting(self) -> float | None:
        """Accuracy lost on choice sets, the mean over sets and runs; None where that was not measured."""
        known = [run.forgetting for run in self.runs if run.forgetting is not None]
        return fmean(known) if len(known) == len(self.runs) else None

    def score(self, metric: str) -> Score | None:
        """One run: the score with its interval over test examples. Several: the mean, from lowest to highest seed."""
        scores = [run.scores[metric] for run in self.runs if metric in run.scores]
        if len(scores) < 2:
            return scores[0] if scores else None
        values, first = [score.value for score in scores], scores[0]
        return replace(first, value=fmean(values), low=min(values), high=max(values))

    def score_text(self, metric: str) -> str:
        """93.6 (91.9 to 95.0), or 93.1 (3 seeds: 92.0 to 94.2); fractions in percent."""
        return score_text(self.score(metric), f"{len(self.runs)} seeds: " if len(self.runs) > 1 else "")


def score_text(score: Score | None, range_of: str = "") -> str:
    """A score with its interval as text; empty for none."""
    if score is None or math.isnan(score.value):
        return "" if score is None else "not finite"
    value, low, high = (format_value(v, score.share) for v in (score.value, score.low, score.high))
    return f"{value} ({range_of}{low} to {high})"
