"""Plots of a run as PNG: training and validation metrics over steps, lengths of the examples.

Drawn by matplotlib (the `eval` extra) from plain rows and numbers, in colors that color-blind readers can tell apart;
each adapter has its own. It knows no trainer and no model.
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
from kitout.install_hint import suggest_install

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")  # of Okabe and Ito
DPI = 130  # per inch
EVAL_PREFIX = "eval_"
MAX_PANELS = 5  # metrics, beside the loss
SKIPPED = ("runtime", "epoch", "model_preparation_time", "perplexity")
SKIPPED_SUFFIXES = ("_runtime", "_per_second", "_low", "_high")

MetricsRow = Mapping[str, Any]  # a line of metrics.jsonl


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """An empty figure without a window."""
    if not has_matplotlib():
        raise ConfigError(f"plots need matplotlib, which is not installed\n  {suggest_install(extra='eval')}")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def write_png(file: Path, png_bytes: bytes) -> Path:
    return write_bytes(file, png_bytes)


@dataclass
class MetricSeries:
    """One metric of one adapter over steps."""

    steps: list[float] = field(default_factory=list)
    """Optimizer steps."""
    values: list[float] = field(default_factory=list)
    """One value per step."""
    intervals: list[tuple[float, float]] = field(default_factory=list)
    """The 95 % interval of each value; (value, value) if it has none."""


def plot_training(rows: Sequence[MetricsRow]) -> bytes:
    """The training loss over steps, raw and smoothed, with the validation loss; beside it every other `eval_` metric.

    rows: as metrics.jsonl has them: step, loss, eval_loss, eval_accuracy, eval_accuracy_low, ...; of several adapters
    "name/loss" and "eval_name/loss" (or "name/eval_loss"), whose means are not drawn.
    """
    training, validation = map(drop_means, collect_series(rows))
    metrics = [name for name in dict.fromkeys(metric for _, metric in validation) if name != "loss"][:MAX_PANELS]
    losses = {job: series for (job, metric), series in training.items() if metric == "loss"}
    jobs = list(dict.fromkeys([*losses, *(job for job, _ in validation)]))
    panels = 1 + len(metrics)
    columns = min(panels, 3)
    figure = new_figure(4.3 * columns + 0.3, 3.3 * math.ceil(panels / columns))
    axes = list(np.atleast_1d(figure.subplots(math.ceil(panels / columns), columns)).flat)
    for i, job in enumerate(jobs):
        color = COLORS[i % len(COLORS)]
        _plot_loss(axes[0], losses.get(job), validation.get((job, "loss")), color, job, is_only_job=len(jobs) == 1)
        for ax, name in zip(axes[1:], metrics, strict=False):
            if (job, name) in validation:
                _plot_metric(ax, validation[job, name], color, job)
    axes[0].set(title="loss", xlabel="step")
    validation_losses = [series for (_, metric), series in validation.items() if metric == "loss"]
    if limits := loss_limits(list(losses.values()), validation_losses):
        axes[0].set_ylim(*limits)
    for ax, name in zip(axes[1:], metrics, strict=False):
        ax.set(title=TITLES.get(name, name.replace("_", " ")) + " (validation)", xlabel="step")
    steps = [step for series in [*losses.values(), *validation.values()] for step in series.steps]
    for ax in axes:
        _style_axis(ax, is_used=bool(ax.lines))
        if steps:
            margin = 0.03 * (max(steps) - min(steps)) or 0.5
            ax.set_xlim(min(steps) - margin, max(steps) + margin)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, fontsize=8)
    return to_png(figure)


def collect_series(
    rows: Sequence[MetricsRow],
) -> tuple[dict[tuple[str, str], MetricSeries], dict[tuple[str, str], MetricSeries]]:
    """(adapter, metric) -> its values over steps, of training and of validation; only finite values."""
    training: dict[tuple[str, str], MetricSeries] = {}
    validation: dict[tuple[str, str], MetricSeries] = {}
    for row in rows:
        if not isinstance(row.get("step"), int | float):
            continue
        for key, value in row.items():
            job, metric, is_validation = _split_key(key)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or metric in ("step", *SKIPPED) or metric.endswith(SKIPPED_SUFFIXES):
                continue
            series = (validation if is_validation else training).setdefault((job, metric), MetricSeries())
            series.steps.append(float(row["step"]))
            series.values.append(float(value))
            low, high = (row.get(f"{key}{end}") for end in ("_low", "_high"))
            has_interval = isinstance(low, int | float) and isinstance(high, int | float)
            series.intervals.append((float(low), float(high)) if has_interval else (float(value), float(value)))  # type: ignore[arg-type]
    return training, validation


def drop_means(series: dict[tuple[str, str], MetricSeries]) -> dict[tuple[str, str], MetricSeries]:
    """Without the means over several adapters: each of these has its own series."""
    per_job = {metric for job, metric in series if job}
    return {(job, metric): one for (job, metric), one in series.items() if job or metric not in per_job}


def _split_key(key: str) -> tuple[str, str, bool]:
    """eval_accuracy, name/eval_accuracy or eval_name/accuracy -> (name, accuracy, is it a validation metric)."""
    job, _, metric = key.rpartition("/")
    is_validation = metric.startswith(EVAL_PREFIX) or job.startswith(EVAL_PREFIX)
    return job.removeprefix(EVAL_PREFIX), metric.removeprefix(EVAL_PREFIX), is_validation


def smooth(values: Sequence[float]) -> list[float]:
    """A moving average over about a twentieth of the run; over fewer values at the ends."""
    half_window = max(1, len(values) // 40)
    total = np.concatenate(([0.0], np.cumsum(values)))
    indices = np.arange(len(values))
    first, last = np.maximum(0, indices - half_window), np.minimum(len(values), indices + half_window + 1)
    return [float(v) for v in (total[last] - total[first]) / (last - first)]


def _plot_loss(
    ax: Any,
    train_series: MetricSeries | None,
    eval_series: MetricSeries | None,
    color: str,
    job: str,
    is_only_job: bool,
) -> None:
    prefix = f"{job}: " if job else ""
    if train_series:
        ax.plot(train_series.steps, train_series.values, color=color, linewidth=0.7, alpha=0.3)
        ax.plot(train_series.steps, smooth(train_series.values), color=color, linewidth=1.8, label=f"{prefix}training")
    if eval_series:
        eval_color = COLORS[1] if is_only_job else color
        style = {"color": eval_color, "linewidth": 1.2, "markersize": 4.5, "label": f"{prefix}validation"}
        ax.plot(eval_series.steps, eval_series.values, "o--", **style)


def _plot_metric(ax: Any, series: MetricSeries, color: str, job: str) -> None:
    ax.plot(series.steps, series.values, "o-", color=color, linewidth=1.5, markersize=4.5, label=job or None)
    if any(low < high for low, high in series.intervals):
        ax.fill_between(series.steps, *zip(*series.intervals, strict=True), color=color, alpha=0.15, linewidth=0)
    if min(series.values) >= 0 > ax.get_ylim()[0]:  # values near 0: no space below 0
        ax.set_ylim(-0.03 * ax.get_ylim()[1], None)
    if job:
        ax.legend(frameon=False, fontsize=8)


def loss_limits(
    train_series: Sequence[MetricSeries], eval_series: Sequence[MetricSeries]
) -> tuple[float, float] | None:  # fmt: skip
    """What to show: the upper end follows the smoothed loss, because the first few steps may be far above all others.

    None without a loss.
    """
    highest = [max(smooth(series.values)) for series in train_series if series.values] + [
        max(series.values) for series in eval_series if series.values
    ]
    lowest = [min(series.values) for series in [*train_series, *eval_series] if series.values]
    if not highest:
        return None
    margin = 0.08 * (max(highest) - min(lowest)) or 0.1
    return min(lowest) - margin, max(highest) + 2 * margin


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
    """A histogram of tokens per example, by split. max_length: where longer examples are truncated."""
    splits = {name: list(values) for name, values in token_counts.items() if len(values)}
    if not splits:
        raise ConfigError("lengths: there are no examples")
    figure = new_figure(6.2, 3.0)
    ax = figure.subplots()
    longest = max(max(values) for values in splits.values())
    bins = np.arange(0, longest + 2 * bin_width(longest), bin_width(longest))
    for i, (name, values) in enumerate(splits.items()):
        percent = np.full(len(values), 100 / len(values))
        label = f"{name}: {len(values):,} examples, {sum(values):,} tokens"
        ax.hist(values, bins, weights=percent, histtype="stepfilled", alpha=0.25, color=COLORS[i % 8])
        ax.hist(values, bins, weights=percent, histtype="step", linewidth=1.4, color=COLORS[i % 8], label=label)
    if max_length is not None and max_length <= 1.5 * longest:
        ax.axvline(max_length, linestyle="--", linewidth=1, color="0.3", label=f"truncated at {max_length:,}")
    ax.set(title="length of the examples", xlabel="tokens")
    ax.set_ylabel("% of the examples", fontsize=9)
    _style_axis(ax, is_used=True)
    ax.legend(frameon=False, fontsize=8)
    return to_png(figure)


def plot_part_weights(parts: Sequence[str], layers: Sequence[str], weights: Any) -> bytes:
    """Weights [parts, layers, rows, positions] of a composition as maps of layers and positions, one for each part.

    Averaged over rows. `kitout.attention` gives all three.
    """
    values = np.asarray(weights, dtype=float)
    if values.ndim != 4 or values.shape[:2] != (len(parts), len(layers)) or not values.size:
        raise ConfigError(f"weights are [parts, layers, rows, positions], found {list(values.shape)}")
    means = np.nanmean(values, axis=2)
    figure = new_figure(1.2 + 3.0 * len(parts), 1.2 + 0.22 * len(layers))
    axes = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    limits = {"vmin": min(0.0, float(np.nanmin(means))), "vmax": max(1.0, float(np.nanmax(means)))}
    for ax, name, of_part in zip(axes, parts, means, strict=True):
        drawn = ax.imshow(of_part, aspect="auto", origin="lower", cmap="cividis", **limits)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("position", fontsize=9)
        ax.set_yticks(range(len(layers)), layers, fontsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("layer", fontsize=9)
    figure.colorbar(drawn, ax=list(axes), label="weight")
    return to_png(figure)


def bin_width(max_value: int) -> int:
    """A round width of about thirty bins."""
    power = 10 ** max(0, math.floor(math.log10(max(1, max_value / 30))))
    return next(w * power for w in (1, 2, 5, 10) if w * power * 30 >= max_value)
