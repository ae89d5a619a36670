"""The pre-flight page: what is about to be learnt from, with what, at what cost, and what looks wrong about it.

Drawn in colour on a terminal, in plain text elsewhere, and kept in the run's folder as preflight.txt and .json. Text
from the data cannot act on the terminal nor be taken for a mark of the page. It knows facts and figures, no model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from kitout.data.statistics import QUANTILES, Facts, Part
from kitout.files.atomic import write_text
from kitout.format import amount, one_line, safe, seconds, size
from kitout.runtime.count import ParameterCount
from kitout.train.metrics_log import to_json_value
from kitout.train.run_folder import PREFLIGHT

WIDTH, BAR = 100, 32
LONGEST = 1400  # characters of the shown example; what is learnt keeps more of them
LABELS = 12  # classes shown, the most frequent first
LEARNT, MASKED, HEAD, DIM, WARN = "bold green", "dim", "bold", "dim", "yellow"
MARKS = (("«", "»"), ("⟦", "⟧"), ("❮", "❯"), ("[[", "]]"))
BLOCKS = "▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Preflight:
    """What is shown. settings: what is chosen and why, in words. example: spans of one example and whether they are
    learnt (`facts.rendered`); answer: its label or number, if it has one. sites: rows of role, layers, widths, number
    (`kit.show.site_rows` of the adapter's sites). memory in bytes and time in seconds are estimates; None: left out (of
    several jobs, the last page tells them for all).
    """

    settings: Mapping[str, str]
    facts: Facts
    example: Sequence[tuple[str, bool]]
    answer: str
    count: ParameterCount
    sites: Sequence[tuple[str, str, str, str]]
    steps: int
    memory: int | None = None
    time: float | None = None
    warnings: Sequence[str] = ()  # besides those of the facts


def show(page: Preflight, console: Console | None = None) -> None:
    """On the console: in colour where it has any, and nowhere wider than a page."""
    console = console or Console()
    if not console.is_terminal:  # a file has no width of its own
        console.print(text(page), markup=False, highlight=False, soft_wrap=True, end="")
        return
    colour = console.color_system is not None and not console.no_color
    console.print(drawn(page, colour), width=min(console.width, WIDTH))


def save(pages: Sequence[Preflight], folder: Path) -> None:
    """preflight.json for machines (a list if there are several jobs), preflight.txt for eyes."""
    values, words = PREFLIGHT
    held = [to_json_value(asdict(page)) for page in pages]
    write_text(folder / values, json.dumps(held[0] if len(held) == 1 else held, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / words, "\n".join(map(text, pages)))


def text(page: Preflight) -> str:
    """Without colours, marks instead."""
    buffer = io.StringIO()
    paper = Console(file=buffer, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    paper.print(drawn(page, colour=False))
    return "\n".join(line.rstrip() for line in buffer.getvalue().split("\n"))


def drawn(page: Preflight, colour: bool) -> RenderableType:
    parts: list[RenderableType] = [_settings(page)]
    for title, body in (
        ("data", _data(page.facts)),
        ("lengths of the training part, in tokens", _histogram(page.facts.train)),
        ("labels of the training part", _labels(page.facts.train)),
        ("one example", _example(page, colour)),
        ("what is trained", _trained(page)),
        ("estimated cost", _cost(page)),
        ("warnings", _warnings([*page.warnings, *page.facts.warnings])),
    ):
        if body is not None:
            parts += [Text(""), Rule(title, align="left", style=DIM), Padding(body, (0, 0, 0, 1))]
    return Group(*parts)


def _settings(page: Preflight) -> RenderableType:
    table = _grid()
    for name, value in page.settings.items():
        table.add_row(Text(one_line(name), DIM), Text(safe(value, line=True)))
    return table


def _grid(*right: int, columns: int = 2) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for number in range(columns):
        table.add_column(justify="right" if number in right else "left", overflow="fold")
    return table


def _data(facts: Facts) -> RenderableType:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=DIM, show_edge=False)
    several = any(part.tokens for part in facts.parts)
    names = ["", "examples", *(["tokens", "learnt", "median", "90 %", "longest", "cut"] if several else [])]
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    for part in facts.parts:
        learnt = "-" if part.percent is None else f"{amount(part.learned)} ({part.percent:.3g} %)"
        middle, most = part.quantiles[QUANTILES.index(0.5)], part.quantiles[QUANTILES.index(0.9)]
        figures = [amount(part.tokens), learnt, f"{middle:,}", f"{most:,}", f"{part.longest:,}", f"{part.cut:,}"]
        table.add_row(Text(one_line(part.name)), f"{part.examples:,}", *(figures if several else []))
    longest = max(facts.parts, key=lambda part: part.longest)
    if not several or not longest.longest_place:
        return table
    return Group(table, Text(f"the longest: {one_line(longest.longest_place)}", DIM))


def _histogram(part: Part) -> RenderableType | None:
    if not part.bins:
        return None
    table = _grid(0, 2, columns=3)
    most = max(count for *_, count in part.bins)
    for low, high, count in part.bins:
        ends = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        table.add_row(Text(ends, DIM), Text(bar(count, most), "cyan"), Text(f"{count:,}" if count else "", DIM))
    return table


def bar(count: int, most: int) -> str:
    """At most BAR wide, in eighths; anything above 0 shows."""
    eighths = max(1, round(8 * BAR * count / most)) if count else 0
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (BLOCKS[rest - 1] if rest else "")).ljust(BAR)


def _labels(part: Part) -> RenderableType | None:
    if part.values is not None:
        least, mean, most = part.values
        return Text(f"from {least:.4g} to {most:.4g}, {mean:.4g} on average")
    if not part.labels:
        return None
    table = _grid(2, columns=3)
    ordered = sorted(part.labels.items(), key=lambda pair: -pair[1])
    most = max(1, ordered[0][1])
    for name, count in ordered[:LABELS]:
        table.add_row(Text(one_line(name, 40)), Text(bar(count, most), "cyan"), Text(f"{count:,}", DIM))
    if (more := len(ordered) - LABELS) > 0:
        table.add_row(Text(f"and {more} more", DIM))
    return table


def _example(page: Preflight, colour: bool) -> RenderableType | None:
    if not page.example and not page.answer:
        return None
    spans = [(safe(words), learnt) for words, learnt in _shortened(page.example)]
    marks = _marks("".join(words for words, _ in spans) + page.answer)
    body = Text()
    for words, learnt in spans:
        body += _span(words, learnt, colour, marks)
    if page.answer:
        body += Text("\nlabel: " if spans else "label: ", DIM) + _span(
            safe(page.answer, line=True), True, colour, marks
        )
    if not spans:  # an image is not drawn
        return body
    legend = _span("learnt", True, colour, marks) + Text("   ") + _span("only read", False, colour, marks)
    return Group(legend, Text(""), body)


def _span(words: str, learnt: bool, colour: bool, marks: tuple[str, str]) -> Text:
    if colour:  # a learnt new line has no colour of its own
        return Text(words.replace("\n", "↵\n") if learnt else words, LEARNT if learnt else MASKED)
    return Text(marks[0] + words + marks[1] if learnt else words)


def _marks(words: str) -> tuple[str, str]:
    """Brackets that the text itself does not hold."""
    for times in range(1, len(words) + 2):
        for left, right in MARKS:
            if left * times not in words and right * times not in words:
                return left * times, right * times
    raise AssertionError("a text cannot hold brackets longer than itself")


def _shortened(spans: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Long spans lose their middle: those that are only read first."""
    length = sum(len(words) for words, _ in spans)
    if length <= LONGEST:
        return list(spans)
    share = {learnt: LONGEST / 2 / max(1, sum(kind == learnt for _, kind in spans)) for learnt in (True, False)}
    kept: list[tuple[str, bool]] = []
    for words, learnt in spans:
        most = max(40, int(share[learnt]))
        if len(words) > most:
            out = len(words) - most
            words = f"{words[: most // 2]} ... ({out:,} characters) ... {words[-(most - most // 2) :]}"
        kept.append((words, learnt))
        if len(kept) >= 40:
            kept.append((f" ... ({len(spans) - len(kept)} more spans)", False))
            break
    return kept


def _trained(page: Preflight) -> RenderableType:
    count = page.count
    lines = [
        Text.assemble(
            (f"{count.trainable:,}", HEAD), f" values, {count.percent:.3g} % of the base, {size(count.bytes)}"
        )
    ]
    if count.heads:
        lines.append(Text(f"{count.heads:,} of them in fresh heads", DIM))
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=DIM, show_edge=False)
    for name in ("role", "layers", "in -> out", "sites"):
        table.add_column(name, justify="right" if name == "sites" else "left")
    for row in page.sites:
        table.add_row(*(Text(cell) for cell in row))
    return Group(*lines, table) if page.sites else Group(*lines)


def _cost(page: Preflight) -> RenderableType:
    table = _grid()
    table.add_row(Text("steps", DIM), f"{page.steps:,}")
    if page.memory is not None:
        table.add_row(Text("memory", DIM), f"about {size(page.memory)}")
    if page.time is not None:
        table.add_row(Text("time", DIM), f"about {seconds(page.time)}, besides measuring")
    return table


def _warnings(told: Sequence[str]) -> RenderableType | None:
    if not told:
        return None
    table = _grid()
    for one in told:
        table.add_row(Text("!", WARN), Text(safe(one, line=True), WARN))
    return table
