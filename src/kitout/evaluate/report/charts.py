"""Charts of the report as SVG: lines over steps, histograms, values with intervals. They take the page's own colors.

One chart has the width of a phone and several stand side by side where there is room; text and lines follow light and
dark mode, and nothing has to be scrolled. Drawn from plain values, without matplotlib. Every text is escaped, because
names come from anywhere. It knows no run and no page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 38.0  # margins
NUM_COLORS = 8  # --c0 to --c7 of the page
MAX_POINTS = 400  # of one line: more are not seen
NUM_TICKS = 4

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """What is drawn in one color."""

    name: str = ""
    """For the legend; empty: not in it."""
    color: int = 0
    """Of the page's palette."""
    points: Sequence[Point] = ()
    """(x, y) in the order of x."""
    intervals: Sequence[tuple[float, float]] = ()
    """(low, high) of each point; a band behind a line, bars through single points."""
    has_line: bool = True
    """Whether the points are joined."""
    has_markers: bool = False
    """Whether each point has a dot."""
    is_faint: bool = False
    """Behind the others."""
    is_dashed: bool = False
    """A dashed line."""
    is_filled: bool = False
    """Filled down to 0: a histogram."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One pair of axes."""

    title: str
    """Above it, and what a screen reader says."""
    x_label: str
    """Below it."""
    series: Sequence[Series]
    """What is in it."""
    is_log: bool = False
    """Whether x is in powers of ten."""
    is_whole: bool = True
    """Whether x, if it is not, has ticks at whole numbers alone."""
    y_limits: tuple[float, float] | None = None
    """What y shows; None: all there is."""

    @property
    def legend(self) -> list[tuple[int, str]]:
        """(color, name) of each named series."""
        return [(one.color % NUM_COLORS, one.name) for one in self.series if one.name]

    @property
    def svg(self) -> str:
        """The drawing, safe to stand in a page."""
        points = [point for one in self.series for point in one.points]
        if not points:
            return ""
        xs = [math.log10(max(1.0, x)) if self.is_log else x for x, _ in points]
        ends = [y for one in self.series for pair in one.intervals for y in pair] + [y for _, y in points]
        is_histogram = any(one.is_filled for one in self.series)
        (x_low, x_high), (y_low, y_high) = _padded(xs, 0.02), _padded(ends, 0.06)
        if self.is_log:
            x_low, x_high = float(math.floor(x_low)), float(math.ceil(x_high))
        y_low = 0.0 if is_histogram or y_low < 0 <= min(ends) else y_low
        if self.y_limits is not None:
            y_low, y_high = self.y_limits

        def place_x(value: float) -> float:
            shown = math.log10(max(1.0, value)) if self.is_log else value
            return LEFT + (shown - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

        def place_y(value: float) -> float:
            share = (min(max(value, y_low), y_high) - y_low) / (y_high - y_low)
            return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

        if self.is_log:  # whole powers of ten, at least two
            x_ticks = [10.0**k for k in range(math.floor(x_low), math.ceil(x_high) + 1)]
        else:
            x_ticks = _ticks(x_low, x_high, whole=self.is_whole)
        parts = [
            f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(self.title)}">',
            *(_y_tick(place_y(y), _short(y)) for y in _ticks(y_low, y_high)),
            *(
                _text(place_x(x), HEIGHT - BOTTOM + 15, _short(x), "middle" if place_x(x) < WIDTH - 16 else "end")
                for x in x_ticks
            ),
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, escape(self.x_label)),
            *(_draw(one, place_x, place_y) for one in self.series),
            "</svg>",
        ]
        return "".join(parts)


def _draw(one: Series, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> str:
    color = f"var(--c{one.color % NUM_COLORS})"
    every = max(1, math.ceil(len(one.points) / MAX_POINTS))
    kept = [i for i in range(len(one.points)) if i % every == 0 or i == len(one.points) - 1]
    places = [(place_x(one.points[i][0]), place_y(one.points[i][1])) for i in kept]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = []
    if one.is_filled:
        floor = f"{HEIGHT - BOTTOM:.1f}"
        parts.append(
            f'<polygon points="{places[0][0]:.1f},{floor} {line} {places[-1][0]:.1f},{floor}" fill="{color}" '
            'opacity=".18"/>'
        )
    if one.intervals and one.has_line and any(low < high for low, high in one.intervals):
        upper = [f"{x:.1f},{place_y(one.intervals[i][1]):.1f}" for i, (x, _) in zip(kept, places, strict=True)]
        lower = [f"{x:.1f},{place_y(one.intervals[i][0]):.1f}" for i, (x, _) in zip(kept, places, strict=True)]
        parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{color}" opacity=".15"/>')
    if one.has_line:
        style = ' opacity=".35" stroke-width="1"' if one.is_faint else ' stroke-width="2"'
        style += ' stroke-dasharray="5 4"' if one.is_dashed else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-linejoin="round"{style}/>')
    elif one.intervals:
        for i, (x, _) in zip(kept, places, strict=True):
            low, high = (place_y(end) for end in one.intervals[i])
            parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{color}" stroke-width="2.5" opacity=".6"/>')
    if one.has_markers or not one.has_line:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in places]
    return "".join(parts)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of the values with a margin; never empty."""
    low, high = min(values), max(values)
    margin = share * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round values between the ends. whole: whole numbers only."""
    step = 10.0 ** math.floor(math.log10((high - low) / NUM_TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= NUM_TICKS + 1)
    step = max(1.0, step) if whole else step
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.4g}"


def _y_tick(y: float, text: str) -> str:
    return f'<path class="grid" d="M{LEFT:.0f} {y:.1f}H{WIDTH - RIGHT:.0f}"/>' + _text(LEFT - 5, y + 4, text, "end")


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
