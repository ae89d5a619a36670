"""Verdicts between the rows of a table: methods with seeds on one test set, and methods over several test sets.

On one test set methods are ranked by the scores of single examples that runs keep, from three seeds of each. From five
test sets those that were trained on all of them have mean ranks (Friedman, Nemenyi). It knows rows, and no page.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kitout.compare.run_row import RunRow
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.significance.by_method import have_same_units, rank_scores
from kitout.evaluate.significance.many import MethodRanking
from kitout.evaluate.significance.seeds import MIN_SEEDS
from kitout.evaluate.significance.tasks import MIN_TASKS, TaskRanking, rank_over_tasks

LARGEST = sys.float_info.max


@dataclass(frozen=True)
class MetricRanking:
    """The rows of one test set by one metric."""

    test: str
    """The letter of the test set."""
    metric: str
    """Its key in `TITLES`."""
    ranking: MethodRanking | None
    """By the labels of the rows."""
    note: str
    """Who is not in it, or why there is none."""
    measured: str = ""
    """How the metric was measured, where that is not the usual way: "by character"."""

    @property
    def letters(self) -> dict[str, str]:
        """Of each row in the ranking: two that share a letter do not differ significantly. Empty without a verdict."""
        if self.ranking is None or not self.ranking.has_verdict:
            return {}
        return dict(zip(self.ranking.names, self.ranking.letters, strict=True))

    @property
    def caption(self) -> str:
        """What the letters say, and what not."""
        texts = ("" if self.ranking is None else self.ranking.caption, self.note)
        return f"{metric_title(self.metric, self.measured)}: {'; '.join(text for text in texts if text)}"


def rank_rows(rows: Sequence[RunRow], metrics: Sequence[str]) -> tuple[MetricRanking, ...]:
    """Every metric of every test set with two rows or more. Without enough seeds for a verdict the headline alone."""
    found = []
    for test in dict.fromkeys(row.test for row in rows if row.test):
        members = [row for row in rows if row.test == test and all(run.test_scores for run in row.runs)]
        enough = sum(len(row.runs) >= MIN_SEEDS for row in members) > 1
        for metric in metrics if enough else metrics[:1]:
            scores = {
                row.label: [run.test_scores[metric] for run in row.runs if metric in run.test_scores] for row in members
            }
            ranking, note = rank_scores(scores, metric)
            if ranking is not None or note:
                measured = next((one.note for own in scores.values() for one in own), "")
                found.append(MetricRanking(test, metric, ranking, note, measured))
    return tuple(found)


def rank_tasks(rows: Sequence[RunRow]) -> tuple[TaskRanking | None, str]:
    """Methods over test sets, by the headline metric of each; None with fewer than two methods on five of them. And
    why there is none although there are five test sets.

    A method is one configuration but for its data; it counts if every test set has it. A value that is not finite, of
    a run that diverged, is the worst of its test set. Losses per token of different tokens are not ranked.
    """
    tested = [row for row in rows if row.test and row.runs[0].recipe]
    tests = list(dict.fromkeys(row.test for row in tested))
    if len(tests) < MIN_TASKS:
        return None, ""
    values: dict[str, dict[str, float]] = {}
    firsts: dict[str, RunRow] = {}
    for test in tests:
        members = [row for row in tested if row.test == test]
        common = [
            m for m in members[0].runs[0].scores
            if all(m in run.scores for row in members for run in row.runs) and have_same_units(m, [
                run.test_scores[m] for row in members for run in row.runs if m in run.test_scores
            ])
        ]  # fmt: skip
        for row in members if common else ():
            scores = [run.scores[common[0]] for run in row.runs]
            recipe = row.runs[0].recipe
            sign = 1 if scores[0].higher_is_better else -1
            value = sign * fmean(score.value for score in scores)
            values.setdefault(recipe, {}).setdefault(test, value if math.isfinite(value) else -LARGEST)
            firsts.setdefault(recipe, row)
    complete = [recipe for recipe, own in values.items() if len(own) == len(tests)]
    if len(complete) < 2:
        return None, "no ranking, because no two methods have a comparable metric on every test set"
    methods = Counter(firsts[recipe].runs[0].method for recipe in complete)
    names = {
        recipe: row.runs[0].method if methods[row.runs[0].method] == 1 else f"{row.runs[0].method} as {row.label}"
        for recipe in complete
        for row in [firsts[recipe]]
    }
    return rank_over_tasks({names[recipe]: [values[recipe][test] for test in tests] for recipe in complete}), ""
