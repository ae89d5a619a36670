"""The critical-difference diagram (Demsar 2006) of a page: mean ranks, and bars over methods that do not differ.

A row per method, so that long names have room on a phone; the bars stand beside the rows. As SVG in the page's own
colors, every text escaped. It knows a ranking over tasks, and no page.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from kitout.evaluate.significance.tasks import TaskRanking

WIDTH, LEFT = 360.0, 158.0  # of all, and of the names
TOP, ROW, BAR_STEP = 52.0, 20.0, 9.0
MAX_NAME_CHARS = 25


@dataclass(frozen=True)
class RankDiagram:
    """Drawn as a chart is: a title, a legend and an SVG."""

    ranking: TaskRanking
    """The methods and their mean ranks."""

    @property
    def title(self) -> str:
        """Above it, and what a screen reader says."""
        number = self.ranking.num_tasks
        return f"mean rank over {number} test sets, 1 is best; methods on one bar do not differ significantly"

    @property
    def legend(self) -> list[tuple[int, str]]:
        """Names stand in the drawing."""
        return []

    @property
    def svg(self) -> str:
        """The drawing, safe to stand in a page."""
        one, k = self.ranking, len(self.ranking.names)
        right = WIDTH - 12 - BAR_STEP * len(one.groups)

        def place(rank: float) -> float:
            return LEFT + (rank - 1) / (k - 1) * (right - LEFT)

        bottom = TOP + ROW * k
        parts = [f'<svg viewBox="0 0 {WIDTH:.0f} {bottom + 8:.0f}" role="img" aria-label="{escape(self.title)}">']
        end = place(min(1 + one.critical_difference, float(k)))
        parts.append(_line(f"M{LEFT:.1f} 17V25M{LEFT:.1f} 21H{end:.1f}M{end:.1f} 17V25"))
        parts.append(_text(4, 25, f"critical difference {one.critical_difference:.2f}", "start"))
        step = -(-k // 8)
        for tick in range(1, k + 1, step):
            parts.append(f'<path class="grid" d="M{place(tick):.1f} {TOP - 4:.1f}V{bottom:.1f}"/>')
            parts.append(_text(place(tick), TOP - 9, str(tick)))
        for number, (name, rank) in enumerate(zip(one.names, one.mean_ranks, strict=True)):
            y, is_left = TOP + ROW * (number + 0.5), place(rank) < right - 30
            short = name if len(name) <= MAX_NAME_CHARS else f"{name[: MAX_NAME_CHARS - 1]}…"
            parts.append(_text(4, y + 4, escape(short), "start"))
            parts.append(f'<circle cx="{place(rank):.1f}" cy="{y:.1f}" r="4" fill="var(--c0)"/>')
            x = place(rank) + (8 if is_left else -8)
            parts.append(_text(x, y - 3, f"{rank:.2f}", "start" if is_left else "end"))
        for number, group in enumerate(one.groups):
            x = right + 10 + BAR_STEP * number
            rows = [TOP + ROW * (one.names.index(group[end]) + (0.25, 0.75)[end]) for end in (0, -1)]
            parts.append(f'<path d="M{x:.1f} {rows[0]:.1f}V{rows[1]:.1f}" stroke="var(--c1)" stroke-width="4"/>')
        return "".join([*parts, "</svg>"])


def _line(path: str) -> str:
    return f'<path d="{path}" stroke="var(--soft)" stroke-width="1" fill="none"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
