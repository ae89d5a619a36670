"""What to know before numbers of two rows are compared: other test data, seeds, machines, and what the letters say.

It knows rows and rankings, and puts sentences together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kitout.compare.finished_runs import FinishedRun
from kitout.compare.rankings import MetricRanking
from kitout.compare.run_row import RunRow
from kitout.evaluate.intervals.resampled import Z95
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.significance.power import smallest_difference, smallest_text
from kitout.format import single_line

MAX_NOTE_CHARS = 2000


def table_notes(
    rows: Sequence[RunRow], runs: Sequence[FinishedRun], metrics: Sequence[str], same_test: bool | None,
    rankings: Sequence[MetricRanking], over_tests: str,
) -> list[str]:  # fmt: skip
    """One sentence each."""
    notes = _test_set_notes(rows, same_test)
    if untested := [run.label for run in runs if not run.scores]:
        notes.append(f"without a test split, and so without metrics: {', '.join(untested)}")
    if left_out := _left_out(runs, metrics):
        notes.append(f"left out, because not every run has it: {left_out}")
    notes += [one.caption if same_test is True else f"{one.caption} (test set {one.test})" for one in rankings]
    if over_tests:
        notes.append(f"over test sets: {over_tests}")
    without = [row.label for row in rows if row.test and not all(run.test_scores for run in row.runs)]
    if without and any(run.test_scores for run in runs):
        notes.append(f"no verdict for runs of an earlier version, without scores.safetensors: {', '.join(without)}")
    if any(row.forgetting is not None for row in rows):
        notes.append("forgotten: accuracy lost on sets of choices, in points, the mean over these sets (and seeds)")
        notes += _forgetting_note(rows)
    if any(len(row.runs) == 1 and row.runs[0].scores for row in rows):
        notes.append(
            "intervals: 95 %, over the test examples. Of one seed: another seed moves every result too, so no row is "
            "named the best; train with several (train.seeds=[0,1,2]), and they become one row"
        )
    if not rankings and (smallest := _smallest_difference(rows, metrics)):
        notes.append(
            f"{smallest}. Rows are not paired by example here: where two runs err on the same examples, it is less"
        )
    if grouped := [row for row in rows if len(row.runs) > 1]:
        notes.append(
            "several seeds: the mean, and the lowest to the highest; "
            + "; ".join(f"{row.label}: seeds {', '.join(map(str, row.seeds))}" for row in grouped)
        )
    if len({(run.device, run.dtype) for run in runs}) > 1:
        notes.append("seconds and memory are of different devices or dtypes, and not comparable: see the columns")
    if together := [row.label for row in rows if row.runs[0].num_adapters > 1]:
        notes.append(f"memory is of the whole run where several adapters were trained together: {', '.join(together)}")
    notes += [f"{run.label}: {run.stopped}" for run in runs if run.stopped]
    return [single_line(note, MAX_NOTE_CHARS) for note in notes]


def _test_set_notes(rows: Sequence[RunRow], same_test: bool | None) -> list[str]:
    """Which rows are of which test set, where there are several."""
    if same_test is True:
        return []
    letters = dict.fromkeys(row.test for row in rows if row.test)
    members = "; ".join(f"{a}: {', '.join(row.label for row in rows if row.test == a)}" for a in letters)
    if same_test is None:
        return [f"the test examples may differ: an earlier version of kitout did not record which they are ({members})"]
    text = (
        f"measured on different test examples, so the metrics of one letter are not comparable with those of another, "
        f"and there is no verdict between them ({members}). For one test set: the same data, data.test and data.seed, "
        "or a file as data.test"
    )
    return [text]


def _forgetting_note(rows: Sequence[RunRow]) -> list[str]:
    """Which rows were asked which sets, where these are not the same."""
    by_sets: dict[str, list[str]] = {}
    for row in rows:
        sets = dict.fromkeys(run.forgetting_sets for run in row.runs)
        if row.forgetting is not None:
            by_sets.setdefault("; ".join(sets), []).append(row.label)
    if len(by_sets) < 2:
        return []
    members = "; ".join(f"{', '.join(labels)}: {sets}" for sets, labels in by_sets.items())
    return [f"forgotten was measured on different sets, and is not comparable between these rows: {members}"]


def _smallest_difference(rows: Sequence[RunRow], metrics: Sequence[str]) -> str:
    """What one test set can show of any two rows of one seed, in the headline metric, from their intervals."""
    scores = [score for row in rows if metrics and len(row.runs) == 1 and (score := row.score(metrics[0]))]
    errors = sorted((score.high - score.low) / (2 * Z95) for score in scores)[-2:]
    if len({row.test for row in rows if row.test}) != 1 or len(errors) < 2 or not math.isfinite(errors[-1]):
        return ""
    found = smallest_difference(math.hypot(*errors), scores[0].n, share=scores[0].share)
    return smallest_text([(metric_title(metrics[0]), found)]).partition(";")[0]


def _left_out(runs: Sequence[FinishedRun], metrics: Sequence[str]) -> str:
    """accuracy (a, b): a metric, and the runs that have it."""
    owners: dict[str, list[str]] = {}
    for run in runs:
        for metric in run.scores:
            if metric not in metrics:
                owners.setdefault(metric, []).append(run.label)
    return "; ".join(f"{metric_title(metric)} ({', '.join(labels)})" for metric, labels in owners.items())
