"""One table of finished runs: metrics that all of them have, with intervals, and what each run cost.

Runs of one configuration that differ in the seed alone become one row: the mean, and the lowest and highest of n seeds.
Nothing is named the best that was not shown to be: rows with three seeds and more are ranked as groups, and one seed
says nothing of others. Where the test data differ the table says so. It opens no file.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

from kitout.compare.finished_runs import FinishedRun, read_runs
from kitout.compare.rankings import MetricRanking, rank_rows, rank_tasks
from kitout.compare.render import TableColumn, render
from kitout.compare.run_row import RunRow, score_text
from kitout.compare.table_notes import table_notes
from kitout.errors import ConfigError
from kitout.evaluate.compare import BASE, format_value
from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.significance.tasks import TaskRanking
from kitout.files.atomic import write_text
from kitout.files.system_errors import as_path, as_path_error
from kitout.format import format_bytes, format_duration, single_line
from kitout.train.metrics_log import to_json_value

MAX_LABEL, MAX_METHOD, MAX_MODEL, MAX_DEVICE = 28, 30, 30, 30  # characters of a line in a cell


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
    rankings: tuple[MetricRanking, ...] = ()
    """The rows against each other, by test set and metric."""
    tasks: TaskRanking | None = None
    """Methods over test sets, where there are five or more."""

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int | None = None) -> str:
        """The table and its notes for a terminal of this width; None: this one's."""
        return render(table_columns(self), self.notes, width)

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
                "seconds": row.seconds, "memory": row.memory, "forgetting": row.forgetting,
                "runs": [_run_values(run) for run in row.runs],
            }
            for row in self.rows
        ]  # fmt: skip
        rankings = [
            {"test": one.test, "metric": one.metric, "note": one.note,
             **({} if one.ranking is None else asdict(one.ranking))}
            for one in self.rankings
        ]  # fmt: skip
        return to_json_value({
            "metrics": list(self.metrics), "same_test": self.same_test, "rows": rows, "rankings": rankings,
            "tasks": None if self.tasks is None else asdict(self.tasks), "notes": list(self.notes),
        })  # fmt: skip

    def letters(self, metric: str) -> dict[str, str]:
        """Of each row: two of one test set that share a letter do not differ significantly in this metric."""
        found: dict[str, str] = {}
        for one in self.rankings:
            if one.metric == metric:
                found |= one.letters
        return found

    def to_csv(self, groups: bool = False) -> str:
        """One line per row: metrics as fractions with the ends of their intervals, seconds, bytes.

        groups: with the letters of each metric and the mean accuracy lost on choice sets, in columns at the end.
        """
        ends = ("", "_low", "_high")
        names = [f"{metric}{end}" for metric in self.metrics for end in ends]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        cost = ["trainable", "percent", "seconds", "memory_bytes", "device", "dtype"]
        letters = {metric: self.letters(metric) for metric in self.metrics} if groups else {}
        more = [*(f"{metric}_group" for metric in letters), "forgetting"] if groups else []
        writer.writerow(["run", "model", "method", "seeds", "test", *names, *cost, *more])
        for row in self.rows:
            first = row.runs[0]
            values: list[float | str] = []
            for metric in self.metrics:
                score = row.score(metric)
                values += ["", "", ""] if score is None else [score.value, score.low, score.high]
            seeds = " ".join(str(seed) for seed in row.seeds if seed is not None)
            seconds = "" if row.seconds is None else row.seconds
            own = [first.trainable, first.percent, seconds, row.memory, first.device, first.dtype]
            ends_of_row = [own_letters.get(row.label, "") for own_letters in letters.values()]
            if groups:
                ends_of_row.append("" if row.forgetting is None else str(row.forgetting))
            writer.writerow([row.label, first.model, first.method, seeds, row.test, *values, *own, *ends_of_row])
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
        labels = list(dict.fromkeys(run.method_label for run in members))
        label = members[0].label if len(members) == 1 else _group_label(labels)
        rows.append(RunRow(label, members, letters[indices[0]]))
    tested = [run for run in runs if run.scores]
    metrics = tuple(m for m in (tested[0].scores if tested else ()) if all(m in run.scores for run in tested))
    rankings = rank_rows(rows, metrics)
    tasks, why_not = rank_tasks(rows)
    notes = table_notes(rows, runs, metrics, same_test, rankings, why_not if tasks is None else tasks.verdict)
    return RunTable(tuple(rows), metrics, same_test, tuple(notes), rankings, tasks)


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


def table_columns(table: RunTable) -> list[TableColumn]:
    """What is printed: the headline beside the cost; other metrics behind."""
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
    metrics: list[list[TableColumn]] = []
    for metric in table.metrics:
        last_cell = [score_text(base.base_scores.get(metric))] if base else []
        metrics.append([TableColumn(column_title(rows, metric), [row.score_text(metric) for row in rows] + last_cell)])
        if letters := table.letters(metric):
            title = "group" if metric == table.metrics[0] else f"group by {metric_title(metric)}"
            metrics[-1].append(TableColumn(title, [letters.get(row.label, "") for row in rows]))
    columns += [
        *(metrics[0] if metrics else ()),
        TableColumn("trainable", [f"{run.trainable:,}" for run in firsts], right=True),
        TableColumn("%", [f"{run.percent:.2f}" if run.percent < 99.995 else "100" for run in firsts], right=True),
        TableColumn("time", [_seconds_text(row) for row in rows], right=True),
        TableColumn("memory", [format_bytes(row.memory) for row in rows], right=True),
    ]
    if len({(run.device, run.dtype) for run in firsts}) > 1:
        devices = [single_line(f"{run.device}, {run.dtype}", 80) for run in firsts]
        columns.append(TableColumn("device", devices, most=MAX_DEVICE))
    if any(row.forgetting is not None for row in rows):
        lost = ["" if row.forgetting is None else format_value(row.forgetting, share=True) for row in rows]
        columns.append(TableColumn("forgotten", lost, right=True))
    columns += [column for pair in metrics[1:] for column in pair]
    height = len(rows) + (base is not None)
    return [replace(column, cells=[*column.cells, *[""] * height][:height]) for column in columns]


def _common_baseline(table: RunTable) -> FinishedRun | None:
    """A run whose base (or constant answer) all of them were compared with; None where there are several."""
    runs = [run for row in table.rows for run in row.runs if run.scores]
    distinct = {(run.baseline, *(run.base_scores.get(metric) for metric in table.metrics)) for run in runs}
    return runs[0] if table.same_test and len(distinct) == 1 else None


def column_title(rows: Sequence[RunRow], metric: str) -> str:
    """accuracy %"""
    score = next((score for row in rows if (score := row.score(metric)) is not None), None)
    return metric_title(metric, score.note if score else "") + (" %" if score is not None and score.share else "")


def _seconds_text(row: RunRow) -> str:
    return "not known" if row.seconds is None else format_duration(row.seconds)
