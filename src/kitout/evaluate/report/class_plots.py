"""Plots of results as PNG: adapters compared, the confusion matrix, misclassified images.

Drawn with matplotlib from plain values, in colors that color-blind readers can tell apart. Which images are shown
follows from a rule. It knows no model, no method and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kitout.evaluate.metrics.confusion import Confusion
from kitout.evaluate.report.adapter_table import AdapterRow
from kitout.evaluate.report.plots import COLORS, new_figure, to_png

MAX_NUMBERED_CLASSES = 20  # with more, a cell of the confusion matrix is too small for its number
SHOWN = 24  # misclassified images, at most
MARKERS = "os^vDPX*"
MAX_NAME_CHARS = 14  # of a class name on an axis


def comparison(rows: Sequence[AdapterRow], majority: float | None, heading: str) -> bytes:
    """The headline metric of several adapters with its interval, over their trainable parameters (log scale)."""
    figure = new_figure(8.5, 4.8)
    axes = figure.subplots()
    for number, row in enumerate(sorted(rows, key=lambda r: r.trainable)):
        assert row.score is not None
        factor = 100 if row.score.share else 1
        value, low, high = (factor * v for v in (row.score.value, row.score.low, row.score.high))
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        axes.errorbar(
            max(1, row.trainable), value, yerr=[[max(0.0, value - low)], [max(0.0, high - value)]], fmt=marker,
            color=color, capsize=4, markersize=7, label=f"{row.name}: {row.score_text}, {row.trainable:,}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)
    first = rows[0]
    assert first.score is not None
    title = f"{first.title}, trainable parameters"
    if majority is not None and first.metric == "accuracy":
        # as text: a point far below would press the adapters together
        title += f"\n(majority class: {100 * majority:.1f} %)"
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False, title=title,
        title_fontsize=9,
    )  # fmt: skip
    unit = ", %" if first.score.share else ""
    axes.set(
        xlabel="trainable parameters, head included (log scale)",
        ylabel=f"{first.title} on {first.score.n:,} test examples{unit} (bars: 95 % interval)",
    )
    figure.suptitle(heading, fontsize=11)
    return to_png(figure)


def confusion(title: str, matrix: Confusion) -> bytes:
    """The confusion matrix: fractions of each true class as shades, numbers of examples in the cells."""
    table, names = np.array(matrix.counts), matrix.names
    fractions = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    side = min(14.0, max(5.0, 0.55 * len(names) + 1.5))
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    heatmap = axes.imshow(100 * fractions, cmap="Blues", vmin=0, vmax=100)
    if len(names) <= MAX_NUMBERED_CLASSES:
        for (true, predicted), number in np.ndenumerate(table):
            if number:
                text_color = "white" if fractions[true, predicted] > 0.5 else "black"
                axes.text(predicted, true, str(number), ha="center", va="center", color=text_color, fontsize=9)
        labels = [_shorten(name) for name in names]
        rotation = 0 if max(map(len, labels)) <= 3 else 45
        axes.set_xticks(range(len(names)), labels, rotation=rotation, ha="right" if rotation else "center")
        axes.set_yticks(range(len(names)), labels)
    axes.set(
        xlabel="predicted", ylabel="true",
        title=f"{title}: {100 * matrix.correct / max(1, matrix.total):.1f} % of {matrix.total:,} correct",
    )  # fmt: skip
    figure.colorbar(heatmap, ax=axes, label="% of the true class", shrink=0.8)
    return to_png(figure)


def in_turn(classes: Mapping[int, int]) -> list[int]:
    """Examples (their class by index) class by class in turn, because a test set may be sorted by class."""
    by_class: dict[int, list[int]] = {}
    for i, true in classes.items():
        by_class.setdefault(true, []).append(i)
    rounds = max(map(len, by_class.values()), default=0)
    return [indices[k] for k in range(rounds) for _, indices in sorted(by_class.items()) if k < len(indices)]


def misclassified(predictions: Sequence[int], truth: Sequence[int]) -> list[int]:
    """The misclassified examples, class by class in turn."""
    pairs = enumerate(zip(predictions, truth, strict=True))
    return in_turn({i: true for i, (predicted, true) in pairs if predicted != true})


def errors(title: str, images: Sequence[Any], true: Sequence[str], predicted: Sequence[str], total: int) -> bytes:
    """Misclassified images with both classes. total: how many there are."""
    columns = min(8, max(4, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    figure = new_figure(1.45 * columns, 1.75 * rows + 0.6)
    figure.suptitle(f"{title}: {len(images)} of the {total:,} misclassified test images", fontsize=11)
    for i, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).flat):
        axes.set_axis_off()
        if i < len(images):
            axes.imshow(images[i], interpolation="nearest")
            axes.set_title(f"true {_shorten(true[i])}\npredicted {_shorten(predicted[i])}", fontsize=9)
    return to_png(figure)


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARS else name[: MAX_NAME_CHARS - 1] + "…"
