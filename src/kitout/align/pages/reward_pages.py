"""The reward report: held-out figures of a reward as a section of the pages, and as a picture.

It knows figures, and neither models nor runs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kitout.align.measure.reward_figures import RewardFigures
from kitout.evaluate.metrics.measure import Score, format_value
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.report.charts import Chart, Point, Series
from kitout.evaluate.report.plots import COLORS, new_figure, to_png
from kitout.evaluate.report.section import Section

TITLES = {
    "margin": "mean margin (chosen - rejected)",
    "length_correlation": "correlation of reward and length (Spearman)",
    "desirable_reward": "mean reward of desirable answers",
    "undesirable_reward": "mean reward of undesirable answers",
}
HISTOGRAM_BINS = 30
CAPTION = (
    "Calibration: of pairs the probability that the chosen answer is better is sigmoid(margin), in 10 bins from 0.5 to "
    "1. A correlation far from 0, or an accuracy that depends on which answer is longer, says that length is rewarded."
)
ANSWERS_CAPTION = (
    "Calibration: the probability that an answer is desirable is sigmoid(reward), in 10 bins. A correlation far from 0 "
    "says that length is rewarded."
)


def reward_section(figures: RewardFigures) -> Section:
    """Table and charts."""
    rows = [(TITLES.get(name, metric_title(name)), one) for name, one in figures.scores.items()]
    rows += [(f"accuracy where {name}" if name[0] == "c" else f"accuracy at the {name}", one)
             for name, one in figures.by_length.items()]  # fmt: skip
    table = [("held-out answers", "value", "95 % interval", "n"), *(_row(title, one) for title, one in rows)]
    caption = CAPTION if "margin" in figures.scores else ANSWERS_CAPTION
    return Section(title="The reward on held-out answers", table=table, caption=caption, charts=_charts(figures))


def reward_picture(figures: RewardFigures) -> bytes:
    """Calibration and margins as a PNG; needs matplotlib."""
    figure = new_figure(8.9, 3.4)
    calibration, histogram = figure.subplots(1, 2)
    lowest = _lowest(figures)
    calibration.plot([lowest, 1], [lowest, 1], "--", color="0.6", linewidth=1, label="calibrated")
    x = [one.confidence for one in figures.bins]
    pairs = [(one.correct - one.correct_low, one.correct_high - one.correct) for one in figures.bins]
    ends = np.maximum(np.array(pairs).T, 0.0)  # of shares of 0 and 1 rounding may pass the end
    calibration.errorbar(x, [one.correct for one in figures.bins], ends, fmt="o-", color=COLORS[0], label="held-out")
    calibration.set(title="calibration", xlabel="confidence", ylabel="share that is right", ylim=(-0.03, 1.03))
    for color, (name, values) in enumerate(figures.values.items()):
        histogram.hist(values, _edges(figures), alpha=0.45, color=COLORS[color], label=name)
    if "margin" in figures.values:
        histogram.axvline(0, color="0.4", linewidth=1, linestyle="--")
    histogram.set(title="margins" if "margin" in figures.values else "rewards", ylabel="examples")
    for ax in (calibration, histogram):
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    return to_png(figure)


def _row(title: str, one: Score) -> tuple[str, str, str, str]:
    unit = " %" if one.share else ""
    low, high = (format_value(end, one.share) for end in (one.low, one.high))
    return title, f"{format_value(one.value, one.share)}{unit}", f"{low} to {high}", f"{one.n:,}"


def _lowest(figures: RewardFigures) -> float:
    return 0.5 if "margin" in figures.values else 0.0


def _charts(figures: RewardFigures) -> list[Chart]:
    bins, lowest = figures.bins, _lowest(figures)
    calibration = Chart(
        title="calibration: confidence and how often it is right (%)", x_label="confidence, %",
        series=[
            Series(name="calibrated", color=7, points=[(100 * lowest, 100 * lowest), (100, 100)], is_dashed=True),
            Series(
                name="held-out, bars: 95 % interval", points=[(100 * b.confidence, 100 * b.correct) for b in bins],
                intervals=[(100 * b.correct_low, 100 * b.correct_high) for b in bins], has_line=False,
            ),
        ],
        is_whole=False, y_limits=(0, 100),
    )  # fmt: skip
    name = "margin" if "margin" in figures.values else "reward"
    edges = _edges(figures)
    shown = [
        Series(name=label if len(figures.values) > 1 else "", color=color, points=_steps(edges, v), is_filled=True)
        for color, (label, v) in enumerate(figures.values.items())
        if len(v)
    ]
    return [calibration, Chart(title=f"{name}s (number of examples)", x_label=name, series=shown, is_whole=False)]


def _edges(figures: RewardFigures) -> NDArray[np.float64]:
    """One set of bins for all values."""
    return np.asarray(np.histogram_bin_edges(np.concatenate([*figures.values.values()]), HISTOGRAM_BINS))


def _steps(edges: NDArray[np.float64], values: NDArray[np.float64]) -> list[Point]:
    steps: list[Point] = []
    for left, right, count in zip(edges[:-1], edges[1:], np.histogram(values, edges)[0], strict=True):
        steps += [(float(left), float(count)), (float(right), float(count))]
    return steps
