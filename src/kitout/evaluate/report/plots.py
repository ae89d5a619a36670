"""Pictures of a run as PNG: what was learnt while it trained, how long the examples are.

Drawn by matplotlib (the `eval` extra) from plain rows and numbers; colours are those a colour-blind reader can tell
apart, and a second adapter has another line, not another red. It knows no trainer and no model.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kitout.errors import ConfigError
from kitout.evaluate.metrics.registry import TITLES
from kitout.files.atomic import write_bytes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")  # Okabe and Ito's
DPI = 130  # per inch
EVAL_PREFIX = "eval_"
MAX_PANELS = 5  # metrics, beside the loss
SKIPPED_SUFFIXES = ("runtime", "_per_second", "epoch", "_low", "_high", "model_preparation_time", "perplexity")

MetricsRow = Mapping[str, Any]  # a line of metrics.jsonl


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """An empty figure that draws on no screen."""
    if not has_matplotlib():
        raise ConfigError("pictures need matplotlib, not installed here\n  pip install 'kitout[eval]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure_object: Any) -> bytes:
    held = io.BytesIO()
    figure_object.savefig(held, format="png", dpi=DPI)
    return held.getvalue()


def write_png(file: Path, png_bytes: bytes) -> Path:
    return write_bytes(file, png_bytes)


@dataclass
class MetricSeries:
    """One figure of one adapter over steps. low and high: its interval, where there is one."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    intervals: list[tuple[float, float]] = field(default_factory=list)


def plot_training(rows: Sequence[MetricsRow]) -> bytes:
    """The loss over steps, raw and smoothed, with that on the validation part; beside it every other `eval_` metric.

    rows: as metrics.jsonl has them: step, loss, eval_loss, eval_accuracy, eval_accuracy_low, ...; of several adapters
    "name/loss" and "eval_name/loss" (or "name/eval_loss"), whose means are not drawn.
    """
    learnt, measured = map(_drop_means, collect_series(rows))
    metrics = [name for name in dict.fromkeys(what for _, what in measured) if name != "loss"][:MAX_PANELS]
    losses = {job: line for (job, what), line in learnt.items() if what == "loss"}
    jobs = list(dict.fromkeys([*losses, *(job for job, _ in measured)]))
    panels = 1 + len(metrics)
    columns = min(panels, 3)
    drawn = new_figure(4.3 * columns + 0.3, 3.3 * math.ceil(panels / columns))
    axes = list(np.atleast_1d(drawn.subplots(math.ceil(panels / columns), columns)).flat)
    for number, job in enumerate(jobs):
        colour = COLORS[number % len(COLORS)]
        _plot_loss(axes[0], losses.get(job), measured.get((job, "loss")), colour, job, is_only_job=len(jobs) == 1)
        for ax, name in zip(axes[1:], metrics, strict=False):
            if (job, name) in measured:
                _plot_metric(ax, measured[job, name], colour, job)
    axes[0].set(title="loss", xlabel="step")
    _fit_axis(axes[0], list(losses.values()), [line for (_, what), line in measured.items() if what == "loss"])
    for ax, name in zip(axes[1:], metrics, strict=False):
        ax.set(title=TITLES.get(name, name.replace("_", " ")) + " (validation)", xlabel="step")
    steps = [step for line in [*losses.values(), *measured.values()] for step in line.steps]
    for ax in axes:
        _style_axis(ax, is_used=bool(ax.lines))
        if steps:
            room = 0.03 * (max(steps) - min(steps)) or 0.5
            ax.set_xlim(min(steps) - room, max(steps) + room)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, fontsize=8)
    return to_png(drawn)


def collect_series(
    rows: Sequence[MetricsRow],
) -> tuple[dict[tuple[str, str], MetricSeries], dict[tuple[str, str], MetricSeries]]:
    """(adapter, figure) -> its values over steps: while training, and measured. What is not finite is left out."""
    learnt: dict[tuple[str, str], MetricSeries] = {}
    measured: dict[tuple[str, str], MetricSeries] = {}
    for row in rows:
        if not isinstance(row.get("step"), int | float):
            continue
        for key, value in row.items():
            job, what, evaluated = _split_key(key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or what == "step" or what.endswith(SKIPPED_SUFFIXES):
                continue
            line = (measured if evaluated else learnt).setdefault((job, what), MetricSeries())
            line.steps.append(float(row["step"]))
            line.values.append(float(value))
            low, high = (row.get(f"{key}{end}") for end in ("_low", "_high"))
            known = isinstance(low, int | float) and isinstance(high, int | float)
            line.intervals.append((float(low), float(high)) if known else (float(value), float(value)))  # type: ignore[arg-type]
    return learnt, measured


def _drop_means(series: dict[tuple[str, str], MetricSeries]) -> dict[tuple[str, str], MetricSeries]:
    """Without the means over several adapters, which each have their own line."""
    own = {what for job, what in series if job}
    return {(job, what): line for (job, what), line in series.items() if job or what not in own}


def _split_key(key: str) -> tuple[str, str, bool]:
    """eval_accuracy, name/eval_accuracy or eval_name/accuracy -> (name, accuracy, measured)."""
    job, _, what = key.rpartition("/")
    measured = what.startswith(EVAL_PREFIX) or job.startswith(EVAL_PREFIX)
    return job.removeprefix(EVAL_PREFIX), what.removeprefix(EVAL_PREFIX), measured


def smooth(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours, over about a twentieth of the run; fewer at the ends."""
    reach = max(1, len(values) // 40)
    total = np.concatenate(([0.0], np.cumsum(values)))
    places = np.arange(len(values))
    first, last = np.maximum(0, places - reach), np.minimum(len(values), places + reach + 1)
    return [float(v) for v in (total[last] - total[first]) / (last - first)]


def _plot_loss(
    ax: Any,
    train_series: MetricSeries | None,
    eval_series: MetricSeries | None,
    color: str,
    job: str,
    is_only_job: bool,
) -> None:
    name = f"{job}: " if job else ""
    if train_series:
        ax.plot(train_series.steps, train_series.values, color=color, linewidth=0.7, alpha=0.3)
        ax.plot(train_series.steps, smooth(train_series.values), color=color, linewidth=1.8, label=f"{name}training")
    if eval_series:
        own = COLORS[1] if is_only_job else color
        label = f"{name}validation"
        ax.plot(eval_series.steps, eval_series.values, "o--", color=own, linewidth=1.2, markersize=4.5, label=label)


def _plot_metric(ax: Any, series: MetricSeries, color: str, job: str) -> None:
    ax.plot(series.steps, series.values, "o-", color=color, linewidth=1.5, markersize=4.5, label=job or None)
    if any(low < high for low, high in series.intervals):
        ax.fill_between(series.steps, *zip(*series.intervals, strict=True), color=color, alpha=0.15, linewidth=0)
    if min(series.values) >= 0 > ax.get_ylim()[0]:  # all 0, or close to it: nothing lies below
        ax.set_ylim(-0.03 * ax.get_ylim()[1], None)
    if job:
        ax.legend(frameon=False, fontsize=8)


def _fit_axis(ax: Any, train_series: Sequence[MetricSeries], eval_series: Sequence[MetricSeries]) -> None:
    """The first few steps may be far above all others: they do not press the rest to the floor."""
    most = [max(smooth(line.values)) for line in train_series if line.values] + [
        max(m.values) for m in eval_series if m.values
    ]
    least = [min(line.values) for line in [*train_series, *eval_series] if line.values]
    if most:
        room = 0.08 * (max(most) - min(least)) or 0.1
        ax.set_ylim(min(least) - room, max(most) + 2 * room)


def _style_axis(ax: Any, is_used: bool) -> None:
    if not is_used:
        ax.set_axis_off()
        return
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.title.set_fontsize(10)
    ax.xaxis.label.set_fontsize(9)
    ax.tick_params(labelsize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)


def plot_lengths(token_counts: Mapping[str, Sequence[int]], max_length: int | None = None) -> bytes:
    """How many examples have how many tokens, by part of the data. limit: where longer ones are cut."""
    held = {name: list(values) for name, values in token_counts.items() if len(values)}
    if not held:
        raise ConfigError("lengths: there are no examples to count tokens of")
    drawn = new_figure(6.2, 3.0)
    ax = drawn.subplots()
    most = max(max(values) for values in held.values())
    bins = np.arange(0, most + 2 * _bin_width(most), _bin_width(most))
    for number, (name, values) in enumerate(held.items()):
        share = np.full(len(values), 100 / len(values))
        label = f"{name}: {len(values):,} examples, {sum(values):,} tokens"
        ax.hist(values, bins, weights=share, histtype="stepfilled", alpha=0.25, color=COLORS[number % 8])
        ax.hist(values, bins, weights=share, histtype="step", linewidth=1.4, color=COLORS[number % 8], label=label)
    if max_length is not None and max_length <= 1.5 * most:
        ax.axvline(max_length, linestyle="--", linewidth=1, color="0.3", label=f"cut at {max_length:,}")
    ax.set(title="length of the examples", xlabel="tokens")
    ax.set_ylabel("% of the examples", fontsize=9)
    _style_axis(ax, is_used=True)
    ax.legend(frameon=False, fontsize=8)
    return to_png(drawn)


def _bin_width(max_value: int) -> int:
    """A round width of about thirty bins."""
    power = 10 ** max(0, math.floor(math.log10(max(1, max_value / 30))))
    return next(w * power for w in (1, 2, 5, 10) if w * power * 30 >= max_value)
