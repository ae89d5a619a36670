"""A comparison as a folder: report.html with its pictures inside, table.csv and results.json.

Pictures are drawn for each test set: quality over trainable parameters, and over the accuracy that is lost on other
sets where runs have measured that; from five test sets the mean ranks. Equal tables give equal files. It knows the
table, and no run.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from types import SimpleNamespace

from kitout.compare.run_row import RunRow
from kitout.compare.run_table import RunTable, column_title, table_columns
from kitout.errors import ConfigError
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.report.charts import Chart, Series
from kitout.evaluate.report.html import template
from kitout.evaluate.report.rank_diagram import RankDiagram
from kitout.files.atomic import replace_folder
from kitout.files.system_errors import as_path, as_path_error

REPORT, TABLE, RESULTS = NAMES = ("report.html", "table.csv", "results.json")
FILE_SUFFIXES = {".html", ".json", ".md", ".pdf", ".tsv", ".txt", ".xlsx", ".yaml"}  # what is meant to be one file


def write_folder(table: RunTable, folder: str | PathLike[str]) -> None:
    """Writes the three files to a new or empty folder, or to one that holds an earlier comparison, all or none."""
    path = as_path(folder)
    if path.suffix.lower() in FILE_SUFFIXES and not path.is_dir():
        raise ConfigError(f"{path}: name a folder, for {', '.join(NAMES)}, or a file that ends with .csv")

    def write(into: Path) -> None:
        (into / REPORT).write_text(render_page(table), encoding="utf-8")
        (into / TABLE).write_text(table.to_csv(groups=True), encoding="utf-8")
        (into / RESULTS).write_text(json.dumps(table.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    with as_path_error("written", path):
        replace_folder(path, NAMES, write)


def render_page(table: RunTable) -> str:
    """report.html: nothing of it lies in other files, and no script is in it."""
    rankings = [
        SimpleNamespace(name=_with_test(table, metric_title(one.metric), one.test), pairs=one.ranking.pairs)
        for one in table.rankings
        if one.ranking is not None
    ]
    charts = [*([RankDiagram(table.tasks)] if table.tasks is not None else []), *_charts(table)]
    tests = Counter(row.test for row in table.rows if row.test)
    num_methods = max(tests.values(), default=len(table.rows))
    where = f" on {len(tests)} test set{'s' * (len(tests) > 1)}" if tests else ", no test set"
    page = template(files(__package__).joinpath("compare.html").read_text(encoding="utf-8"))
    return str(page.render(
        title=f"{num_methods} method{'s' * (num_methods > 1)}{where}",
        columns=table_columns(table), scores=[column_title(table.rows, metric) for metric in table.metrics],
        notes=table.notes, charts=charts, rankings=rankings,
    ))  # fmt: skip


def _charts(table: RunTable) -> list[Chart]:
    charts = []
    for test in dict.fromkeys(row.test for row in table.rows if row.test):
        rows = [row for row in table.rows if row.test == test]
        for metric in table.metrics[:1]:
            shown = [row for row in rows if (score := row.score(metric)) is not None and math.isfinite(score.value)]
            title = _with_test(table, column_title(shown, metric), test)
            if len(shown) > 1:
                charts.append(Chart(
                    title=f"{title}, by size; bars: lowest to highest seed, of one seed the 95 % interval",
                    x_label="trainable parameters, head included", is_log=True,
                    series=[_point(rows, row, metric, float(row.runs[0].trainable)) for row in shown],
                ))  # fmt: skip
            measured = [row for row in shown if row.forgetting is not None]
            if measured:
                charts.append(Chart(
                    title=f"{title}, and what was forgotten", x_label="accuracy lost on other sets, points (mean)",
                    series=[_point(rows, row, metric, 100 * (row.forgetting or 0.0)) for row in measured],
                    is_whole=False,
                ))  # fmt: skip
    return charts


def _point(rows: Sequence[RunRow], row: RunRow, metric: str, x: float) -> Series:
    score = row.score(metric)
    assert score is not None
    value, low, high = (v * (100 if score.share else 1) for v in (score.value, score.low, score.high))
    name = f"{row.label}: {row.score_text(metric)}"
    return Series(name=name, color=rows.index(row), points=[(x, value)], intervals=[(low, high)], has_line=False)


def _with_test(table: RunTable, text: str, test: str) -> str:
    return text if table.same_test else f"{text} (test set {test})"
