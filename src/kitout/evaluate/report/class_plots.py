"""Pictures of what adapters reached: which class is taken for which, several adapters compared, images misclassified.

Drawn with matplotlib as PNG from plain values; colors are those a color-blind reader can tell apart. Which images are
shown follows from a rule. It knows no model, no method and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kitout.evaluate.report.adapter_table import AdapterRow
from kitout.evaluate.report.plots import COLORS, new_figure, to_png

FEW = 20  # classes; above, a cell of the confusion matrix is too small to hold its number
SHOWN = 24  # misclassified images
SIGNS = "os^vDPX*"
LONGEST = 14  # letters of a class name on an axis


def comparison(rows: Sequence[AdapterRow], majority: float | None, heading: str) -> bytes:
    """The headline metric of several adapters with its interval over their trained values, on a log scale."""
    drawn = new_figure(8.5, 4.8)
    axes = drawn.subplots()
    for number, row in enumerate(sorted(rows, key=lambda r: r.trainable)):
        assert row.score is not None
        times = 100 if row.score.share else 1
        middle, low, high = (times * value for value in (row.score.value, row.score.low, row.score.high))
        color, sign = COLORS[number % len(COLORS)], SIGNS[number % len(SIGNS)]
        axes.errorbar(
            max(1, row.trainable), middle, yerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]], fmt=sign,
            color=color, capsize=4, markersize=7, label=f"{row.name}: {row.reached}, {row.trainable:,}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)
    first = rows[0]
    assert first.score is not None
    title = f"{first.title}, trained values"
    if majority is not None and first.metric == "accuracy":
        # named, not drawn: far below, it would press the adapters together
        title += f"\n(most frequent class: {100 * majority:.1f} %)"
    drawn.legend(
        *axes.get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False, title=title,
        title_fontsize=9,
    )  # fmt: skip
    unit = ", %" if first.score.share else ""
    axes.set(
        xlabel="trained values, head included (log scale)",
        ylabel=f"{first.title} on {first.score.n:,} test examples{unit} (bars: 95 % interval)",
    )
    drawn.suptitle(heading, fontsize=11)
    return to_png(drawn)


def counts(predictions: Sequence[int], truth: Sequence[int], classes: int) -> Any:
    """[true, predicted] numbers of examples."""
    table = np.zeros((classes, classes), dtype=int)
    np.add.at(table, (np.asarray(truth, dtype=int), np.asarray(predictions, dtype=int)), 1)
    return table


def confusion(title: str, predictions: Sequence[int], truth: Sequence[int], names: Sequence[str]) -> bytes:
    """Which class is taken for which: shares of each true class as shades, numbers of examples in the cells."""
    table = counts(predictions, truth, len(names))
    shares = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    side = min(14.0, max(5.0, 0.55 * len(names) + 1.5))
    drawn = new_figure(side + 1, side)
    axes = drawn.subplots()
    shade = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    if len(names) <= FEW:
        for (true, said), number in np.ndenumerate(table):
            if number:
                ink = "white" if shares[true, said] > 0.5 else "black"
                axes.text(said, true, str(number), ha="center", va="center", color=ink, fontsize=9)
        short = [_short(name) for name in names]
        tilt = 0 if max(map(len, short)) <= 3 else 45
        axes.set_xticks(range(len(names)), short, rotation=tilt, ha="right" if tilt else "center")
        axes.set_yticks(range(len(names)), short)
    right = int(np.trace(table))
    axes.set(
        xlabel="predicted", ylabel="true",
        title=f"{title}: {100 * right / max(1, len(truth)):.1f} % of {len(truth):,} right",
    )  # fmt: skip
    drawn.colorbar(shade, ax=axes, label="% of the true class", shrink=0.8)
    return to_png(drawn)


def misclassified(predictions: Sequence[int], truth: Sequence[int]) -> list[int]:
    """The first examples that are wrong, class by class in turn, since a test set may be sorted by class."""
    classes: dict[int, list[int]] = {}
    for i, (said, true) in enumerate(zip(predictions, truth, strict=True)):
        if said != true:
            classes.setdefault(true, []).append(i)
    turns = max(map(len, classes.values()), default=0)
    return [held[turn] for turn in range(turns) for _, held in sorted(classes.items()) if turn < len(held)]


def errors(title: str, pictures: Sequence[Any], true: Sequence[str], said: Sequence[str], wrong: int) -> bytes:
    """Misclassified images with both classes. wrong: how many there are in all."""
    columns = min(8, max(4, len(pictures)))
    lines = max(1, math.ceil(len(pictures) / columns))
    drawn = new_figure(1.45 * columns, 1.75 * lines + 0.6)
    drawn.suptitle(f"{title}: {len(pictures)} of the {wrong:,} test images it got wrong", fontsize=11)
    for place, axes in enumerate(np.atleast_1d(drawn.subplots(lines, columns)).flat):
        axes.set_axis_off()
        if place < len(pictures):
            axes.imshow(pictures[place], interpolation="nearest")
            axes.set_title(f"true {_short(true[place])}\nsaid {_short(said[place])}", fontsize=9)
    return to_png(drawn)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
