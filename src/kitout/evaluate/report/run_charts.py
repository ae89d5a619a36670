"""Which charts a report has: losses and metrics over steps, lengths of the examples, adapters by their size.

The same values as the PNGs of `plots` and `class_plots`, which lie in the run's folder. It knows rows and numbers, and
neither a trainer nor a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kitout.evaluate.metrics.registry import TITLES
from kitout.evaluate.report.adapter_table import AdapterRow
from kitout.evaluate.report.charts import Chart, Point, Series
from kitout.evaluate.report.plots import (
    MAX_PANELS,
    MetricSeries,
    MetricsRow,
    bin_width,
    collect_series,
    drop_means,
    loss_limits,
    smooth,
)


def training_charts(rows: Sequence[MetricsRow]) -> list[Chart]:
    """The loss, raw and smoothed, with the validation loss; then every other validation metric with its interval."""
    training, validation = map(drop_means, collect_series(rows))
    losses = {job: series for (job, metric), series in training.items() if metric == "loss"}
    jobs = list(dict.fromkeys([*losses, *(job for job, _ in validation)]))
    drawn: list[Series] = []
    for color, job in enumerate(jobs):
        prefix = f"{job}: " if job else ""
        if job in losses:
            points = _points(losses[job])
            drawn.append(Series(color=color, points=points, is_faint=True))
            smoothed = list(zip(losses[job].steps, smooth(losses[job].values), strict=True))
            drawn.append(Series(name=f"{prefix}training", color=color, points=smoothed))
        if (job, "loss") in validation:
            drawn.append(Series(
                name=f"{prefix}validation", color=1 if len(jobs) == 1 else color,
                points=_points(validation[job, "loss"]), has_markers=True, is_dashed=True,
            ))  # fmt: skip
    limits = loss_limits(list(losses.values()), [one for (_, name), one in validation.items() if name == "loss"])
    charts = [Chart(title="loss", x_label="step", series=drawn, y_limits=limits)] if drawn else []
    metrics = [name for name in dict.fromkeys(metric for _, metric in validation) if name != "loss"][:MAX_PANELS]
    for name in metrics:
        shown = [
            Series(name=job, color=color, points=_points(series), intervals=series.intervals, has_markers=True)
            for color, job in enumerate(jobs)
            if (series := validation.get((job, name)))
        ]
        title = f"{TITLES.get(name, name.replace('_', ' '))} (validation)"
        charts.append(Chart(title=title, x_label="step", series=shown))
    return charts


def lengths_chart(token_counts: Mapping[str, Sequence[int]]) -> Chart | None:
    """A histogram of tokens per example, by split; None without examples."""
    splits = {name: list(values) for name, values in token_counts.items() if len(values)}
    if not splits:
        return None
    width = bin_width(max(map(max, splits.values())))
    edges = np.arange(0, max(map(max, splits.values())) + 2 * width, width)
    shown = []
    for color, (name, values) in enumerate(splits.items()):
        percent = 100 * np.histogram(values, edges)[0] / len(values)
        steps: list[Point] = []
        for left, right, share in zip(edges[:-1], edges[1:], percent, strict=True):
            steps += [(float(left), float(share)), (float(right), float(share))]
        label = f"{name}: {len(values):,} examples, {sum(values):,} tokens"
        shown.append(Series(name=label, color=color, points=steps, is_filled=True))
    return Chart(title="length of the examples (% of them)", x_label="tokens", series=shown)


def adapters_chart(rows: Sequence[AdapterRow]) -> Chart:
    """The headline metric of several adapters with its interval, over their trainable parameters."""
    shown = []
    for color, row in enumerate(sorted(rows, key=lambda r: r.trainable)):
        assert row.score is not None
        value, low, high = (
            v * (100 if row.score.share else 1) for v in (row.score.value, row.score.low, row.score.high)
        )
        shown.append(Series(
            name=f"{row.name}: {row.score_text}, {row.trainable:,}", color=color, points=[(row.trainable, value)],
            intervals=[(low, high)], has_line=False,
        ))  # fmt: skip
    unit = " %" if rows[0].score is not None and rows[0].score.share else ""
    return Chart(
        title=f"{rows[0].title}{unit}, bars: 95 % interval", x_label="trainable parameters, head included",
        series=shown, is_log=True,
    )  # fmt: skip


def _points(series: MetricSeries) -> list[Point]:
    return list(zip(series.steps, series.values, strict=True))
