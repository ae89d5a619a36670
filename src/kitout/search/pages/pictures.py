"""The page's charts and maps as PNG and SVG files beside it, drawn by matplotlib (the `eval` extra) where it is there.

It knows charts and maps, and no search.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kitout.evaluate.report.charts import Chart
from kitout.evaluate.report.plots import COLORS, has_matplotlib, new_figure, to_png, write_png
from kitout.files.atomic import write_bytes
from kitout.search.pages.site_map import SiteMap

FRONTS, MAPS = "fronts", "sites"
COLUMN = 4.6  # inches
MAP_COLORS = "cividis_r"  # readable by color-blind readers, and in gray


def write_pictures(charts: Sequence[Chart], maps: Sequence[SiteMap], folder: Path) -> None:
    """fronts.png, fronts.svg, sites.png and sites.svg; nothing without matplotlib."""
    if not has_matplotlib():
        return
    if charts:
        _write(_draw_charts(charts), FRONTS, folder)
    if maps:
        _write(_draw_maps(maps), MAPS, folder)


def _write(figure: Any, name: str, folder: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_bytes(folder / f"{name}.svg", buffer.getvalue())
    write_png(folder / f"{name}.png", to_png(figure))


def _draw_charts(charts: Sequence[Chart]) -> Any:
    figure = new_figure(COLUMN * len(charts), 3.7)
    for ax, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        for one in chart.series:
            color = COLORS[one.color % len(COLORS)]
            xs, ys = zip(*one.points, strict=True)
            if one.has_line:
                ax.plot(xs, ys, "--", color=color, linewidth=1.4)
                continue
            below, above = zip(
                *((y - low, high - y) for y, (low, high) in zip(ys, one.intervals, strict=True)), strict=True
            )
            errors = [[max(0.0, value) for value in ends] for ends in (below, above)]
            ax.errorbar(xs, ys, yerr=errors, fmt="o", color=color, markersize=4.5, elinewidth=1.2, label=one.name)
        if chart.is_log:
            ax.set_xscale("log")
        title, _, note = chart.title.partition("; ")
        ax.set_title(f"{title}\n{note}" if note else title, fontsize=9)
        ax.set_xlabel(chart.x_label, fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=7, loc="lower right")  # "best" is slow, and warns of it
    return figure


def _draw_maps(maps: Sequence[SiteMap]) -> Any:
    tallest = max(one.depth for one in maps)
    figure = new_figure(COLUMN * len(maps), 1.8 + 0.2 * tallest)
    for ax, one in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        roles = one.roles
        grid = [[one.cells.get((layer, role), float("nan")) for role in roles] for layer in range(one.depth)]
        ax.imshow(grid, cmap=MAP_COLORS, aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        title, _, where = one.title.rpartition(", ")
        ax.set_title(f"{title}\n{where}\n{one.range_text}", fontsize=8)
        ax.set_xticks(range(len(roles)), roles, rotation=60, ha="right", fontsize=7)
        ax.set_ylabel("block", fontsize=8)
        ax.locator_params(axis="y", integer=True, min_n_ticks=1)
        ax.tick_params(axis="y", labelsize=7)
    return figure
