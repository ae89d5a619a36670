"""Maps of blocks x roles: where the candidates were trained, and how much gradient a site of the frozen model gets.

One map for each tower, as SVG in the page's own colors: the fuller a cell, the more. It knows places and numbers, and
no search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from kitout.base.site import ROLES

WIDTH, LEFT, RIGHT = 360.0, 34.0, 8.0
MAX_ROW, MIN_ROW, ROWS_HEIGHT = 20.0, 7.0, 240.0
MAX_COLUMN, LABELS_HEIGHT = 44.0, 62.0
MAX_BLOCK_LABELS = 14
FAINTEST = 0.07  # of a cell that is not 0

Place = tuple[str, int, str]  # tower, block, role


@dataclass(frozen=True)
class SiteMap:
    """Drawn as a chart is: a title, a legend and an SVG."""

    title: str
    """Above it, and what a screen reader says."""
    cells: Mapping[tuple[int, str], float]
    """By block and role, 0 to 1: how full."""
    texts: Mapping[tuple[int, str], str]
    """The same for a pointer over a cell."""
    range_text: str
    """What an empty and a full cell mean."""

    @property
    def legend(self) -> list[tuple[int, str]]:
        """(color, name)"""
        return [(0, self.range_text)]

    @property
    def roles(self) -> list[str]:
        """Its columns."""
        found = {role for _, role in self.cells}
        return [role for role in ROLES if role in found]

    @property
    def depth(self) -> int:
        """Its rows."""
        return 1 + max(layer for layer, _ in self.cells)

    @property
    def svg(self) -> str:
        """The drawing, safe to stand in a page."""
        roles, depth = self.roles, self.depth
        row = max(MIN_ROW, min(MAX_ROW, ROWS_HEIGHT / depth))
        column = min(MAX_COLUMN, (WIDTH - LEFT - RIGHT) / len(roles))
        height = LABELS_HEIGHT + row * depth + 8
        parts = [f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(self.title)}">']
        for number, role in enumerate(roles):
            x = LEFT + column * (number + 0.5)
            turn = f'transform="rotate(-55 {x:.1f} {LABELS_HEIGHT - 6:.1f})"'
            parts.append(f'<text x="{x:.1f}" y="{LABELS_HEIGHT - 6:.1f}" {turn}>{escape(role)}</text>')
        every = -(-depth // MAX_BLOCK_LABELS)
        for layer in range(0, depth, every):
            y = LABELS_HEIGHT + row * (layer + 0.5) + 4
            parts.append(f'<text x="{LEFT - 6:.1f}" y="{y:.1f}" text-anchor="end">{layer}</text>')
        for (layer, role), share in self.cells.items():
            x, y = LEFT + column * roles.index(role), LABELS_HEIGHT + row * layer
            opacity = 0.0 if share <= 0 else FAINTEST + (1 - FAINTEST) * min(1.0, share)
            parts.append(
                f'<rect x="{x + 0.7:.1f}" y="{y + 0.7:.1f}" width="{column - 1.4:.1f}" height="{row - 1.4:.1f}" '
                f'fill="var(--c0)" fill-opacity="{opacity:.2f}" stroke="var(--line)" stroke-width=".7">'
                f"<title>{escape(self.texts[layer, role])}</title></rect>"
            )
        return "".join([*parts, "</svg>"])


def training_maps(places: Mapping[str, Sequence[Place]], lengths: Mapping[str, float]) -> list[SiteMap]:
    """Which part of all training steps went to candidates that act at a place. lengths: of each, how far it came."""
    whole = sum(lengths.values())
    shares: dict[Place, float] = {}
    for name, own in places.items():
        for place in own:
            shares[place] = shares.get(place, 0.0) + lengths.get(name, 0.0) / (whole or 1.0)
    return _maps(
        "where the candidates were trained", "empty: none, full: all of the training steps", shares,
        {place: f"{100 * share:.0f} % of the training steps" for place, share in shares.items()},
    )  # fmt: skip


def gradient_maps(energies: Sequence[tuple[str, int, str, float]]) -> list[SiteMap]:
    """The gradient energy |G|^2 of the frozen model's sites, in powers of ten. Sites of one place are added up."""
    sums: dict[Place, float] = {}
    for tower, layer, role, energy in energies:
        sums[tower, layer, role] = sums.get((tower, layer, role), 0.0) + energy
    logs = {place: math.log10(value) for place, value in sums.items() if value > 0}
    if not logs:
        return []
    low, high = min(logs.values()), max(logs.values())
    filled = {p: (logs[p] - low) / (high - low or 1.0) + 1e-9 if p in logs else 0.0 for p in sums}
    return _maps(
        "gradient energy |G|² of the frozen model's sites, on a logarithmic scale",
        f"from {10**low:.2g} to {10**high:.2g}", filled, {p: f"{sums[p]:.3g}" for p in sums},
    )  # fmt: skip


def _maps(title: str, legend: str, shares: Mapping[Place, float], texts: Mapping[Place, str]) -> list[SiteMap]:
    towers = list(dict.fromkeys(tower for tower, _, _ in shares))
    return [
        SiteMap(
            f"{title}, blocks × roles{f' of {tower}' if len(towers) > 1 else ''}",
            {(layer, role): share for (own, layer, role), share in shares.items() if own == tower},
            {p[1:]: f"block {p[1]}, {p[2]}: {texts[p]}" for p in shares if p[0] == tower},
            legend,
        )
        for tower in towers
    ]
