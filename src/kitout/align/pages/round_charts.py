"""Charts of reinforcement over steps: rewards with intervals, KL, entropy, length, clipping, explained variance.

For the report as SVG and for the run's folder as PNG, from the same rows of metrics.jsonl; what a run does not log has
no panel. It knows rows and numbers, and neither a trainer nor a page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kitout.evaluate.report.charts import Chart, Series
from kitout.evaluate.report.plots import (
    COLORS,
    MetricSeries,
    MetricsRow,
    collect_series,
    new_figure,
    smooth,
    to_png,
)

REWARD, COLUMNS = "reward", 3
SMOOTHED_FROM = 12  # values


@dataclass(frozen=True)
class Panel:
    """One metric over steps."""

    title: str
    """What it is, with its unit."""
    series: Mapping[str, MetricSeries]
    """By name; "" where there is one."""
    factor: float = 1.0
    """What values are multiplied by: 100 for percent."""


PANELS = {
    "kl_to_reference": ("KL to the reference (nats per answer)", 1.0),
    "kl": ("penalty of the KL (nats per answer)", 1.0),
    "entropy": ("entropy (nats per token)", 1.0),
    "answer_tokens": ("length of answers (tokens)", 1.0),
    "ended": ("answers that end by themselves (%)", 100.0),
    "clip_fraction": ("tokens whose ratio is clipped (%)", 100.0),
    "groups_without_spread": ("groups whose answers all have one reward (%)", 100.0),
    "explained_variance": ("explained variance of the values", 1.0),
    "beta": ("beta", 1.0),
}


def panels_of(rows: Sequence[MetricsRow]) -> list[Panel]:
    """What these rows have: the reward and each source, the held-out reward, then the others in a fixed order."""
    training, validation = collect_series(rows)
    by_name = {metric: one for (_, metric), one in training.items()}
    rewards = {name: one for name, one in by_name.items() if name == REWARD or name.startswith(f"{REWARD}_")}
    shown = []
    if rewards:
        several = len(rewards) > 1
        names = {name: name.removeprefix(f"{REWARD}_") if name != REWARD else "weighted sum" for name in rewards}
        series = {names[name] if several else "": one for name, one in rewards.items()}
        band = (
            ", band: 95 % interval" if any(low < high for one in series.values() for low, high in one.intervals) else ""
        )
        shown.append(Panel(f"reward of sampled answers{band}", series))
    held_out = next((one for (_, metric), one in validation.items() if metric == REWARD), None)
    if held_out is not None:
        shown.append(Panel("reward of greedy answers (validation)", {"": held_out}))
    shown += [Panel(title, {"": by_name[name]}, factor) for name, (title, factor) in PANELS.items() if name in by_name]
    return shown


def round_charts(rows: Sequence[MetricsRow]) -> list[Chart]:
    """Of the report."""
    charts = []
    for panel in panels_of(rows):
        drawn = []
        for color, (name, one) in enumerate(panel.series.items()):
            points = [(step, panel.factor * value) for step, value in zip(one.steps, one.values, strict=True)]
            bands = [(panel.factor * low, panel.factor * high) for low, high in one.intervals]
            if len(points) >= SMOOTHED_FROM:
                drawn.append(Series(color=color, points=points, intervals=bands, is_faint=True))
                values = [panel.factor * value for value in smooth(one.values)]
                drawn.append(Series(name=name, color=color, points=list(zip(one.steps, values, strict=True))))
            else:
                drawn.append(Series(name=name, color=color, points=points, intervals=bands, has_markers=True))
        charts.append(Chart(title=panel.title, x_label="step", series=drawn))
    return charts


def plot_rounds(rows: Sequence[MetricsRow]) -> bytes:
    """The same as a PNG; needs matplotlib."""
    panels = panels_of(rows)
    columns = min(COLUMNS, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = new_figure(4.3 * columns + 0.3, 3.0 * height)
    axes = list(figure.subplots(height, columns, squeeze=False).flat)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, panel in zip(axes, panels, strict=False):
        for color, (name, one) in zip(COLORS, panel.series.items(), strict=False):
            low, high = ([panel.factor * pair[end] for pair in one.intervals] for end in (0, 1))
            values = [panel.factor * value for value in one.values]
            is_long = len(values) >= SMOOTHED_FROM
            ax.fill_between(one.steps, low, high, color=color, alpha=0.15, linewidth=0)
            ax.plot(one.steps, values, color=color, linewidth=0.8 if is_long else 1.5, alpha=0.4 if is_long else 1)
            if is_long:
                ax.plot(one.steps, smooth(values), color=color, linewidth=1.6, label=name or None)
            elif name:
                ax.lines[-1].set_label(name)
        ax.set_title(panel.title, fontsize=9.5)
        ax.set_xlabel("step", fontsize=9)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if len(panel.series) > 1:
            ax.legend(frameon=False, fontsize=8)
    return to_png(figure)
