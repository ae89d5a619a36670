"""Heat maps of blocks x roles, as PNG and SVG: gradients, and the ranks that were made of them.

One row of panels per tower. Sites of one role in one block (experts) are added up. Drawn by matplotlib (the `eval`
extra) in one color from light to dark, with the numbers of ranks in the cells. It knows signals and ranks, and no run.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kitout.base.site import ROLES
from kitout.evaluate.report.plots import new_figure, to_png, write_png
from kitout.files.atomic import write_bytes
from kitout.signals.site_signals import Signals, SiteSignals

PNG_FILE, SVG_FILE = "sites.png", "sites.svg"
COLORS = "cividis_r"  # readable by color-blind readers, and in gray
MAX_CELLS_WITH_NUMBERS = 400
MAX_COLUMNS = 4

Grid = list[list[float]]  # by block, by role; nan where there is no site


def write_heat_maps(signals: Signals, ranks: Mapping[str, Mapping[str, int]], folder: Path) -> list[Path]:
    """Writes both files; returns their paths."""
    figure = _draw(signals, ranks)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return [
        write_png(folder / PNG_FILE, to_png(figure)),
        write_bytes(folder / SVG_FILE, buffer.getvalue()),
    ]


def _draw(signals: Signals, ranks: Mapping[str, Mapping[str, int]]) -> Any:
    by_tower: dict[str, list[SiteSignals]] = {}
    for site in signals.values():
        by_tower.setdefault(site.tower, []).append(site)
    panels: dict[str, Mapping[str, float]] = {
        "log10 of |G|^2": {site.path: site.gradient_energy for site in signals.values()},
        "log10 of Fisher mass": {site.path: site.fisher_mass for site in signals.values()},
    }
    products = {site.path: site.weight_gradient for site in signals.values() if site.weight_gradient is not None}
    if products:
        panels["log10 of mean |W * G|"] = products
    panels |= {f"rank by {name}": values for name, values in ranks.items()}
    num_columns = min(MAX_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    depths = [1 + max(site.layer for site in sites) for sites in by_tower.values()]
    figure = new_figure(2.8 * num_columns + 0.5, num_rows * (1.7 * len(by_tower) + 0.2 * sum(depths)))
    heights = [1.7 + 0.2 * depth for depth in depths for _ in range(num_rows)]
    axes = figure.subplots(len(heights), num_columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    highest = max((rank for values in ranks.values() for rank in values.values()), default=1)
    for number, (tower, sites) in enumerate(by_tower.items()):
        roles = [role for role in ROLES if any(site.role == role for site in sites)]
        own_axes = axes[number * num_rows : (number + 1) * num_rows].flatten()
        for axis in own_axes[len(panels) :]:
            axis.set_axis_off()
        for axis, (title, values) in zip(own_axes, panels.items(), strict=False):
            is_rank = title.startswith("rank")
            grid = _grid(sites, roles, values, is_log=not is_rank)
            limits = {"vmin": 0, "vmax": highest} if is_rank else {}
            image = axis.imshow(grid, cmap=COLORS, aspect="auto", interpolation="nearest", **limits)
            axis.set_title(title, fontsize=9)
            axis.set_xticks(range(len(roles)), roles, rotation=60, ha="right", fontsize=7)
            axis.locator_params(axis="y", integer=True, min_n_ticks=1)
            axis.tick_params(axis="y", labelsize=7)
            if is_rank:
                _write_numbers(axis, grid, highest)
            else:
                figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
        for axis in axes[number * num_rows : (number + 1) * num_rows, 0]:
            axis.set_ylabel(f"block of {tower}" if len(by_tower) > 1 else "block", fontsize=8)
    return figure


def _grid(sites: list[SiteSignals], roles: list[str], values: Mapping[str, float], is_log: bool) -> Grid:
    sums: dict[tuple[int, str], float] = {}
    for site in sites:
        place = site.layer, site.role
        sums[place] = sums.get(place, 0.0) + float(values[site.path])
    if is_log:
        sums = {place: math.log10(value) if value > 0 else math.nan for place, value in sums.items()}
    depth = 1 + max(site.layer for site in sites)
    return [[sums.get((layer, role), math.nan) for role in roles] for layer in range(depth)]


def _write_numbers(axis: Any, grid: Grid, highest: int) -> None:
    cells = [(x, y, value) for y, row in enumerate(grid) for x, value in enumerate(row) if not math.isnan(value)]
    for x, y, value in cells if len(cells) <= MAX_CELLS_WITH_NUMBERS else []:
        color = "white" if value > highest / 2 else "black"
        axis.text(x, y, f"{value:g}", ha="center", va="center", fontsize=6, color=color)
