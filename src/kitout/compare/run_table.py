"""One table of finished runs: metrics that all of them have, with intervals, and what each run cost.

Runs of one configuration that differ in the seed alone become one row: the mean, and the lowest and highest of n seeds.
Nothing is named the best: intervals are over test examples, and one seed says nothing of others. Where the test data
differ the table says so. It opens no file.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from statistics import fmean
from typing import Any

from kitout.compare.finished_runs import FinishedRun, read_runs
from kitout.compare.render import TableColumn, render
from kitout.errors import ConfigError
from kitout.evaluate.compare import BASE, format_value
from kitout.evaluate.intervals.resampled import Z95
from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.significance.power import smallest_difference, smallest_text
from kitout.files.atomic import write_text
from kitout.files.system_errors import as_path, as_path_error
from kitout.format import format_bytes, format_duration, single_line
from kitout.train.metrics_log import to_json_value

MAX_LABEL, MAX_METHOD, MAX_MODEL, MAX_DEVICE = 28, 30, 30, 30  # characters of a line in a cell


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

    def score(self, metric: str) -> Score | None:
        """One run: the score with its interval over test examples. Several: the mean, from lowest to highest seed."""
        scores = [run.scores[metric] for run in self.runs if metric in run.scores]
        if len(scores) < 2:
            return scores[0] if scores else None
        values, first = [score.value for score in scores], scores[0]
        return replace(first, value=fmean(values), low=min(values), high=max(values))

    def score_text(self, metric: str) -> str:
        """93.6 (91.9 to 95.0), or 93.1 (3 seeds: 92.0 to 94.2); fractions in percent."""
        return _score_text(self.score(metric), f"{len(self.runs)} seeds: " if len(self.runs) > 1 else "")


@dataclass(frozen=True)
class RunTable:
    """What `kitout compare` prints; `print(table)` does, `table.to_dict()` and `table.to_csv()` give its values."""

    rows: tuple[RunRow, ...]
    """In the order the runs were given."""
    metrics: tuple[str, ...]
    """Those that every run with a test split has, the headline first."""
    same_test: bool | None
    """Whether all were measured on the same test examples; None where earlier versions did not record it."""
    notes: tuple[str, ...]
    """What to know before numbers of two rows are compared."""

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int | None = None) -> str:
        """The table and its notes for a terminal of this width; None: this one's."""
        return render(_columns(self), self.notes, width)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every row with its runs, and the notes."""
        rows = [
            {
                "label": row.label, "model": row.runs[0].model, "method": row.runs[0].method, "test": row.test,
                "num_seeds": len(row.runs), "seeds": list(row.seeds),
                "metrics": {
                    metric: _score_values(score, len(row.runs))
                    for metric in self.metrics if (score := row.score(metric)) is not None
                },
                "trainable": row.runs[0].trainable, "percent": row.runs[0].percent,
                "seconds": row.seconds, "memory": row.memory,
                "runs": [_run_values(run) for run in row.runs],
            }
            for row in self.rows
        ]  # fmt: skip
        return to_json_value(
            {"metrics": list(self.metrics), "same_test": self.same_test, "rows": rows, "notes": list(self.notes)}
        )

    def to_csv(self) -> str:
        """One line per row: metrics as fractions with the ends of their intervals, seconds, bytes."""
        ends = ("", "_low", "_high")
        names = [f"{metric}{end}" for metric in self.metrics for end in ends]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        cost = ["trainable", "percent", "seconds", "memory_bytes", "device", "dtype"]
        writer.writerow(["run", "model", "method", "seeds", "test", *names, *cost])
        for row in self.rows:
            first = row.runs[0]
            values: list[float | str] = []
            for metric in self.metrics:
                score = row.score(metric)
                values += ["", "", ""] if score is None else [score.value, score.low, score.high]
            seeds = " ".join(str(seed) for seed in row.seeds if seed is not None)
            seconds = "" if row.seconds is None else row.seconds
            own = [first.trainable, first.percent, seconds, row.memory, first.device, first.dtype]
            writer.writerow([row.label, first.model, first.method, seeds, row.test, *values, *own])
        return text.getvalue()


def compare_runs(folders: Sequence[str | PathLike[str]], *, group_seeds: bool = True) -> RunTable:
    """The table of these run folders, each with one adapter or several. ConfigError names all that is wrong at once.

    group_seeds: runs of one configuration that differ in train.seed alone become one row, with their number.
    """
    return build_table(read_runs(folders), group_seeds=group_seeds)


def write_csv(table: RunTable, file: str | PathLike[str]) -> None:
    """Writes `table.to_csv()` to a .csv file, whole or not at all."""
    path = as_path(file)
    if path.suffix.lower() != ".csv":
        raise ConfigError(f"{path}: the table is written as CSV: name a file that ends with .csv")
    with as_path_error("written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, table.to_csv())


def build_table(runs: Sequence[FinishedRun], *, group_seeds: bool = True) -> RunTable:
    """The table of runs that were read already."""
    letters, same_test = _test_letters(runs)
    groups: dict[Any, list[int]] = {}
    copies: Counter[Any] = Counter()
    for i, run in enumerate(runs):
        key: Any = i
        if group_seeds and run.config and run.seed is not None:
            key = run.config, letters[i]
            copies[key, run.seed] += 1  # run twice with one seed: a repetition is not another seed
            key = *key, copies[key, run.seed]
        groups.setdefault(key, []).append(i)
    rows = []
    for indices in groups.values():
        members = tuple(runs[i] for i in indices)
        label = members[0].label if len(members) == 1 else _group_label([run.label for run in members])
        rows.append(RunRow(label, members, letters[indices[0]]))
    tested = [run for run in runs if run.scores]
    metrics = tuple(m for m in (tested[0].scores if tested else ()) if all(m in run.scores for run in tested))
    return RunTable(tuple(rows), metrics, same_test, tuple(_notes(rows, runs, metrics, same_test)))


def _group_label(labels: Sequence[str]) -> str:
    text = ", ".join(labels)
    return text if len(text) <= MAX_LABEL else f"{labels[0]} and {len(labels) - 1} more"


def _test_letters(runs: Sequence[FinishedRun]) -> tuple[list[str], bool | None]:
    """A letter for each set of test examples, and whether all are one.

    Runs of earlier versions kept a fingerprint of all examples together: where that is equal, so are the test examples.
    """
    by_data = {run.data: run.test_data for run in runs if run.test_data}
    keys = [(run.test_data or by_data.get(run.data, f"all of {run.data}"), run.num_test) for run in runs]
    distinct = list(dict.fromkeys(key for key, run in zip(keys, runs, strict=True) if run.scores))
    letters = [_letter(distinct.index(key)) if run.scores else "" for key, run in zip(keys, runs, strict=True)]
    if len(distinct) < 2:
        return letters, True
    unknown = any(key.startswith("all of ") for key, _ in distinct)
    sizes = {number for _, number in distinct}
    return letters, None if unknown and len(sizes) == 1 else False


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"T{index + 1}"


def _notes(
    rows: Sequence[RunRow], runs: Sequence[FinishedRun], metrics: Sequence[str], same_test: bool | None
) -> list[str]:
    notes = []
    if same_test is not True:
        letters = dict.fromkeys(row.test for row in rows if row.test)
        members = "; ".join(f"{a}: {', '.join(row.label for row in rows if row.test == a)}" for a in letters)
        if same_test is None:
            notes.append(
                f"the test examples may differ: an earlier version of kitout did not record which they are ({members})"
            )
        else:
            notes.append(
                f"measured on different test examples, so the metrics of one letter are not comparable with those of "
                f"another ({members}). For one test set: the same data, data.test and data.seed, or a file as data.test"
            )
    if untested := [run.label for run in runs if not run.scores]:
        notes.append(f"without a test split, and so without metrics: {', '.join(untested)}")
    if left_out := _left_out(runs, metrics):
        notes.append(f"left out, because not every run has it: {left_out}")
    if any(len(row.runs) == 1 and row.runs[0].scores for row in rows):
        notes.append(
            "intervals: 95 %, over the test examples. Of one seed: another seed moves every result too, so no row is "
            "named the best; repeat each with other seeds (train.seed=1, ...), and they become one row"
        )
    if smallest := _smallest_difference(rows, metrics):
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
    return [single_line(note, 2000) for note in notes]


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


def _score_values(score: Score, num_seeds: int) -> dict[str, Any]:
    over = "test examples" if num_seeds == 1 else "seeds"
    return {
        "value": score.value, "low": score.low, "high": score.high, "interval": "95 %" if num_seeds == 1 else "range",
        "over": over, "n": score.n if num_seeds == 1 else num_seeds, "num_test": score.n,
        "higher_is_better": score.higher_is_better,
    }  # fmt: skip


def _run_values(run: FinishedRun) -> dict[str, Any]:
    scores: Mapping[str, Mapping[str, Score]] = {"metrics": run.scores, "base_metrics": run.base_scores}
    return {
        "folder": str(run.folder), "adapter": run.adapter, "seed": run.seed,
        **{name: {key: _score_values(s, 1) for key, s in own.items()} for name, own in scores.items()},
        "baseline": run.baseline, "data": run.data, "test_data": run.test_data, "num_test": run.num_test,
        "trainable": run.trainable, "percent": run.percent, "seconds": run.seconds, "memory": run.memory,
        "device": run.device, "dtype": run.dtype, "stopped": run.stopped,
    }  # fmt: skip


def _columns(table: RunTable) -> list[TableColumn]:
    """The headline beside the cost; other metrics behind."""
    rows, base = table.rows, _common_baseline(table)
    firsts = [row.runs[0] for row in rows]
    last = ["" if base is None else base.baseline if base.baseline != BASE else "the base alone"]
    columns = [
        TableColumn("run", [*(single_line(row.label, 200) for row in rows), *last], most=MAX_LABEL),
        TableColumn("method", [single_line(run.method, 200) for run in firsts], most=MAX_METHOD),
    ]
    if len({run.model for run in firsts}) > 1:
        columns.insert(1, TableColumn("base", [single_line(run.model, 200) for run in firsts], most=MAX_MODEL))
    if table.same_test is not True:
        columns.append(TableColumn("test set", [row.test for row in rows]))
    metrics = [
        TableColumn(
            _metric_title(rows, metric),
            [row.score_text(metric) for row in rows] + ([_score_text(base.base_scores.get(metric))] if base else []),
        )
        for metric in table.metrics
    ]
    columns += [
        *metrics[:1],
        TableColumn("trainable", [f"{run.trainable:,}" for run in firsts], right=True),
        TableColumn("%", [f"{run.percent:.2f}" if run.percent < 99.995 else "100" for run in firsts], right=True),
        TableColumn("time", [_seconds_text(row) for row in rows], right=True),
        TableColumn("memory", [format_bytes(row.memory) for row in rows], right=True),
    ]
    if len({(run.device, run.dtype) for run in firsts}) > 1:
        devices = [single_line(f"{run.device}, {run.dtype}", 80) for run in firsts]
        columns.append(TableColumn("device", devices, most=MAX_DEVICE))
    columns += metrics[1:]
    height = len(rows) + (base is not None)
    return [replace(column, cells=[*column.cells, *[""] * height][:height]) for column in columns]


def _common_baseline(table: RunTable) -> FinishedRun | None:
    """A run whose base (or constant answer) all of them were compared with; None where there are several."""
    runs = [run for row in table.rows for run in row.runs if run.scores]
    distinct = {(run.baseline, *(run.base_scores.get(metric) for metric in table.metrics)) for run in runs}
    return runs[0] if table.same_test and len(distinct) == 1 else None


def _score_text(score: Score | None, range_of: str = "") -> str:
    if score is None or math.isnan(score.value):
        return "" if score is None else "not finite"
    value, low, high = (format_value(v, score.share) for v in (score.value, score.low, score.high))
    return f"{value} ({range_of}{low} to {high})"


def _metric_title(rows: Sequence[RunRow], metric: str) -> str:
    score = next((score for row in rows if (score := row.score(metric)) is not None), None)
    return metric_title(metric, score.note if score else "") + (" %" if score is not None and score.share else "")


def _seconds_text(row: RunRow) -> str:
    return "not known" if row.seconds is None else format_duration(row.seconds)
