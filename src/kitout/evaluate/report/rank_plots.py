"""The critical difference diagram (Demsar 2006): methods by mean rank over tasks, bars over those that do not differ.

Drawn with matplotlib from a `TaskRanking`. The best methods are at the left; the length above the axis is Nemenyi's
critical difference. It computes no test.
"""

from __future__ import annotations

import math

from kitout.evaluate.report.plots import COLORS, new_figure, to_png
from kitout.evaluate.significance.tasks import TaskRanking

ROW = 0.24  # inches between two names
BAR = 0.12  # inches between two bars


def plot_critical_difference(ranking: TaskRanking, title: str = "") -> bytes:
    """A PNG. The first half of the methods is named at the left, the other at the right."""
    names, ranks = ranking.names, ranking.mean_ranks
    k, half = len(names), math.ceil(len(names) / 2)
    depth = BAR * (len(ranking.groups) + 1) + ROW * half  # below the axis
    above = 0.75 if title else 0.5
    figure = new_figure(8.0, above + depth + 0.25)
    axes = figure.subplots()
    axes.set_axis_off()
    margin = 0.45 * (k - 1) + 0.3  # room for names, in ranks
    axes.set_xlim(1 - margin, k + margin)
    axes.set_ylim(-depth - 0.1, above)
    line = {"color": "0.2", "linewidth": 1.0, "solid_capstyle": "butt"}
    axes.plot([1, k], [0, 0], **line)
    for tick in range(1, k + 1):
        axes.plot([tick, tick], [0, 0.07], **line)
        axes.text(tick, 0.1, str(tick), ha="center", va="bottom", fontsize=8)
    length = min(ranking.critical_difference, k - 1)
    axes.plot([1, 1 + length], [0.36, 0.36], color=COLORS[1], linewidth=2)
    of_axis = "" if length == ranking.critical_difference else " (longer than the axis)"
    label = f"critical difference {ranking.critical_difference:.2f}{of_axis}"
    axes.text(1 + length + 0.05 * (k - 1), 0.36, label, va="center", fontsize=8)
    for i, group in enumerate(ranking.groups):
        ends = [ranks[names.index(name)] for name in (group[0], group[-1])]
        y, pad = -BAR * (i + 1), 0.012 * (k - 1)
        axes.plot([ends[0] - pad, ends[1] + pad], [y, y], color=COLORS[0], linewidth=3, solid_capstyle="round")
    for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        is_left = i < half
        row = i if is_left else k - 1 - i
        y, end = -BAR * (len(ranking.groups) + 1) - ROW * (row + 0.5), 1 - 0.2 if is_left else k + 0.2
        axes.plot([rank, rank, end], [0, y, y], **(line | {"linewidth": 0.8}))
        text = f"{name}  {rank:.2f}" if is_left else f"{rank:.2f}  {name}"
        offset = -0.06 if is_left else 0.06
        axes.text(end + offset, y, text, ha="right" if is_left else "left", va="center", fontsize=9)
    if title:
        axes.set_title(title, fontsize=10)
    return to_png(figure)
