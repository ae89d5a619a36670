"""Draws rows.svg: one frozen base, a batch whose rows have different adapters. `python docs/pictures/rows.py`.

Plain SVG with its own colors for light and dark pages. It reads nothing.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 860, 330
ROWS = [  # (input, adapter, color, what it adds, blocks x port where it acts)
    ("“Where is my parcel?”", "tickets: LoRA", "a", "low rank"),
    ("“Translate: good day”", "german: PrefixTuning", "b", "keys, values"),
    ("“Sum up this letter”", "brief: Houlsby", "c", "bottleneck"),
    ("“Hello”", "None: the base", "n", ""),
    ("“Refund, please”", "Stack(tickets, brief)", "a c", "both, in order"),
]
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: var(--ink) }
  .small { font-size: 11px; fill: var(--soft) }
  .head { font-weight: 600 }
  .box { fill: var(--base); stroke: var(--line) }
  .line { stroke: var(--line); fill: none }
  .a { fill: #d97706 } .b { fill: #3b82f6 } .c { fill: #059669 } .n { fill: var(--line) }
  svg { --ink: #1f2937; --soft: #6b7280; --line: #9ca3af; --base: #f3f4f6; --page: #ffffff }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e5e7eb; --soft: #9ca3af; --line: #6b7280; --base: #1f2937; --page: #0d1117 }
  }
"""


def draw() -> str:
    label = "One frozen base; each row of a batch has its own adapter"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" style="fill: var(--page)"/>',
        _text(20, 30, "one batch", "head"),
        _text(235, 30, "one frozen base, in memory once", "head"),
        _text(665, 30, "each row as if alone", "head"),
    ]
    blocks = [260, 390, 520]
    for number, x in enumerate(blocks, start=1):
        parts.append(f'<rect class="box" x="{x}" y="46" width="96" height="258" rx="6"/>')
        parts.append(_text(x + 48, 320, f"block {number}", "small", "middle"))
    for row, (words, adapter, colors, adds) in enumerate(ROWS):
        y = 72 + 50 * row
        parts.append(f'<path class="line" d="M185 {y} H650" stroke-dasharray="{"" if colors != "n" else "4 4"}"/>')
        parts.append(_text(20, y + 4, words))
        for x in blocks:
            for k, color in enumerate(colors.split()):
                if color != "n":
                    parts.append(_mark(color, x + 34 + 20 * k - 10 * (len(colors.split()) - 1), y))
        parts.append(_text(665, y, adapter))
        parts.append(_text(665, y + 15, adds, "small"))
    return "\n".join([*parts, "</svg>\n"])


def _mark(color: str, x: float, y: float) -> str:
    """What an adapter adds in one block, by kind."""
    if color == "a":  # two thin matrices
        return f'<path class="a" d="M{x} {y - 13} h14 l-5 10 v6 l5 10 h-14 l5 -10 v-6 z"/>'
    if color == "b":  # keys and values in front
        return "".join(f'<rect class="b" x="{x + 5 * i}" y="{y - 11}" width="3" height="22"/>' for i in range(4))
    return f'<path class="c" d="M{x - 2} {y - 12} l20 7 v10 l-20 7 z"/>'


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    Path(__file__).with_name("rows.svg").write_text(draw(), encoding="utf-8")
