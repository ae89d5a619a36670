"""Three pictures of a comparison: accuracy over parameters, who is taken for whom, and images that were got wrong.

Drawn with matplotlib and written by one rename each. They show what they are given; colours are those a colour-blind
reader can tell apart. It knows no model and no method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kitout.data.images.image_set import Images
from kitout.evaluate.report.plots import COLOURS, figure, png, possible, write

__all__ = ["compare", "confusion", "counts", "errors", "possible"]

FEW = 20  # classes; above, a cell of the confusion is too small to hold its number
SHOWN = 24  # misclassified images
SIGNS = "os^vDPX*"
LONGEST = 14  # letters of a class name on an axis


def compare(file: Path, rows: Sequence[dict[str, Any]], majority: float, heading: str) -> Path:
    """Accuracy with its interval over trained parameters, on a log scale."""
    drawn = figure(8.5, 4.8)
    axes = drawn.subplots()
    for number, row in enumerate(sorted(rows, key=lambda r: r["trainable"])):
        middle, (low, high) = 100 * row["accuracy"], (100 * side for side in row["interval95"])
        colour, sign = COLOURS[number % len(COLOURS)], SIGNS[number % len(SIGNS)]
        words = f"{row['title']}: {middle:.1f} %, {row['trainable']:,}"
        axes.errorbar(
            row["trainable"], middle, yerr=[[middle - low], [high - middle]], fmt=sign, color=colour, capsize=4,
            markersize=7, label=words,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)
    # the accuracy of always saying one class is told, not drawn: it would press the methods together
    drawn.legend(
        *axes.get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False,
        title=f"accuracy, trained parameters\n(commonest class: {100 * majority:.1f} %)", title_fontsize=9,
    )  # fmt: skip
    axes.set(
        xlabel="trained parameters, head included (log scale)",
        ylabel=f"accuracy on {rows[0]['images']:,} test images, % (bars: 95 % interval)",
    )
    drawn.suptitle(heading, fontsize=11)
    return write(file, png(drawn))


def counts(guesses: Sequence[int], truth: Sequence[int], classes: int) -> Any:
    """[true, said] numbers of images."""
    table = np.zeros((classes, classes), dtype=int)
    np.add.at(table, (np.asarray(truth), np.asarray(guesses)), 1)
    return table


def confusion(file: Path, row: dict[str, Any], truth: Sequence[int], names: Sequence[str]) -> Path:
    """Who is taken for whom: shares of each true class as shades, numbers of images in the cells."""
    table = counts(row["guesses"], truth, len(names))
    shares = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    side = min(14.0, max(5.0, 0.55 * len(names) + 1.5))
    drawn = figure(side + 1, side)
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
    axes.set(
        xlabel="said", ylabel="true", title=f"{row['title']}: {100 * row['accuracy']:.1f} % of {row['images']:,} right"
    )
    drawn.colorbar(shade, ax=axes, label="% of the true class", shrink=0.8)
    return write(file, png(drawn))


def errors(file: Path, row: dict[str, Any], truth: Sequence[int], names: Sequence[str], test: Images) -> Path:
    """The first images that were got wrong, in the order of the test set: nobody picked them."""
    wrong = [i for i, (said, true) in enumerate(zip(row["guesses"], truth, strict=True)) if said != true]
    shown = _spread(wrong, truth)[:SHOWN]
    columns = min(8, max(4, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    drawn = figure(1.45 * columns, 1.75 * lines + 0.6)
    drawn.suptitle(f"{row['title']}: {len(shown)} of the {len(wrong)} test images it got wrong", fontsize=11)
    for place, axes in enumerate(np.atleast_1d(drawn.subplots(lines, columns)).flat):
        axes.set_axis_off()
        if place < len(shown):
            i = shown[place]
            axes.imshow(test.open(i), interpolation="nearest")
            axes.set_title(f"true {_short(names[truth[i]])}\nsaid {_short(names[row['guesses'][i]])}", fontsize=9)
    return write(file, png(drawn))


def _spread(wrong: Sequence[int], truth: Sequence[int]) -> list[int]:
    """Class by class in turn, since a test set may be sorted by class."""
    classes: dict[int, list[int]] = {}
    for i in wrong:
        classes.setdefault(truth[i], []).append(i)
    turns = max(map(len, classes.values()), default=0)
    return [held[turn] for turn in range(turns) for _, held in sorted(classes.items()) if turn < len(held)]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
