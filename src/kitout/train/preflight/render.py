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

from kitout.data.statistics import QUANTILES, DataStatistics, SplitStatistics
from kitout.files.atomic import write_text
from kitout.format import escape_terminal, format_bytes, format_count, format_duration, single_line
from kitout.runtime.count import ParameterCount
from kitout.train.metrics_log import to_json_value
from kitout.train.run_folder import PREFLIGHT_FILES

PAGE_WIDTH, MAX_BAR_WIDTH = 100, 32
MAX_EXAMPLE_CHARS = 1400  # characters of the shown example; what is learnt keeps more of them
MAX_LABELS = 12  # classes shown, the most frequent first
TRAINED, MASKED, HEAD, DIM, WARN = "bold green", "dim", "bold", "dim", "yellow"
BRACKETS = (("«", "»"), ("⟦", "⟧"), ("❮", "❯"), ("[[", "]]"))
BLOCKS = "▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class PreflightPage:
    """What is shown. settings: what is chosen and why, in words. example: spans of one example and whether they are
    learnt (`facts.rendered`); answer: its label or number, if it has one. sites: rows of role, layers, widths, number
    (`kit.show.site_rows` of the adapter's sites). memory in bytes and time in seconds are estimates; None: left out (of
    several jobs, the last page tells them for all).
    """

    settings: Mapping[str, str]
    facts: DataStatistics
    example: Sequence[tuple[str, bool]]
    answer: str
    count: ParameterCount
    sites: Sequence[tuple[str, str, str, str]]
    steps: int
    memory: int | None = None
    time: float | None = None
    warnings: Sequence[str] = ()  # besides those of the facts


def print_page(page: PreflightPage, console: Console | None = None) -> None:
    """On the console: in colour where it has any, and nowhere wider than a page."""
    console = console or Console()
    if not console.is_terminal:  # a file has no width of its own
        console.print(page_text(page), markup=False, highlight=False, soft_wrap=True, end="")
        return
    colour = console.color_system is not None and not console.no_color
    console.print(render(page, colour), width=min(console.width, PAGE_WIDTH))


def save_pages(pages: Sequence[PreflightPage], folder: Path) -> None:
    """preflight.json for machines (a list if there are several jobs), preflight.txt for eyes."""
    values, words = PREFLIGHT_FILES
    held = [to_json_value(asdict(page)) for page in pages]
    write_text(folder / values, json.dumps(held[0] if len(held) == 1 else held, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / words, "\n".join(map(page_text, pages)))


def page_text(page: PreflightPage) -> str:
    """Without colours, marks instead."""
    buffer = io.StringIO()
    paper = Console(file=buffer, width=PAGE_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    paper.print(render(page, color=False))
    return "\n".join(line.rstrip() for line in buffer.getvalue().split("\n"))


def render(page: PreflightPage, color: bool) -> RenderableType:
    parts: list[RenderableType] = [_settings_table(page)]
    for title, body in (
        ("data", _data_table(page.facts)),
        ("lengths of the training part, in tokens", _histogram(page.facts.train)),
        ("labels of the training part", _labels_table(page.facts.train)),
        ("one example", _render_example(page, color)),
        ("what is trained", _trained_table(page)),
        ("estimated cost", _cost_table(page)),
        ("warnings", _warnings_table([*page.warnings, *page.facts.warnings])),
    ):
        if body is not None:
            parts += [Text(""), Rule(title, align="left", style=DIM), Padding(body, (0, 0, 0, 1))]
    return Group(*parts)


def _settings_table(page: PreflightPage) -> RenderableType:
    table = _grid()
    for name, value in page.settings.items():
        table.add_row(Text(single_line(name), DIM), Text(escape_terminal(value, escape_newlines=True)))
    return table


def _grid(*right: int, columns: int = 2) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for number in range(columns):
        table.add_column(justify="right" if number in right else "left", overflow="fold")
    return table


def _data_table(statistics: DataStatistics) -> RenderableType:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=DIM, show_edge=False)
    several = any(part.num_tokens for part in statistics.splits)
    names = ["", "examples", *(["tokens", "learnt", "median", "90 %", "longest", "cut"] if several else [])]
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    for part in statistics.splits:
        learnt = (
            "-" if part.trained_percent is None else f"{format_count(part.num_targets)} ({part.trained_percent:.3g} %)"
        )
        middle, most = part.quantiles[QUANTILES.index(0.5)], part.quantiles[QUANTILES.index(0.9)]
        figures = [
            format_count(part.num_tokens),
            learnt,
            f"{middle:,}",
            f"{most:,}",
            f"{part.max_length:,}",
            f"{part.num_truncated:,}",
        ]
        table.add_row(Text(single_line(part.name)), f"{part.num_examples:,}", *(figures if several else []))
    longest = max(statistics.splits, key=lambda part: part.max_length)
    if not several or not longest.longest_location:
        return table
    return Group(table, Text(f"the longest: {single_line(longest.longest_location)}", DIM))


def _histogram(split: SplitStatistics) -> RenderableType | None:
    if not split.histogram:
        return None
    table = _grid(0, 2, columns=3)
    most = max(count for *_, count in split.histogram)
    for low, high, count in split.histogram:
        ends = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        table.add_row(Text(ends, DIM), Text(bar(count, most), "cyan"), Text(f"{count:,}" if count else "", DIM))
    return table


def bar(count: int, max_count: int) -> str:
    """At most BAR wide, in eighths; anything above 0 shows."""
    eighths = max(1, round(8 * MAX_BAR_WIDTH * count / max_count)) if count else 0
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (BLOCKS[rest - 1] if rest else "")).ljust(MAX_BAR_WIDTH)


def _labels_table(split: SplitStatistics) -> RenderableType | None:
    if split.value_range is not None:
        least, mean, most = split.value_range
        return Text(f"from {least:.4g} to {most:.4g}, {mean:.4g} on average")
    if not split.label_counts:
        return None
    table = _grid(2, columns=3)
    ordered = sorted(split.label_counts.items(), key=lambda pair: -pair[1])
    most = max(1, ordered[0][1])
    for name, count in ordered[:MAX_LABELS]:
        table.add_row(Text(single_line(name, 40)), Text(bar(count, most), "cyan"), Text(f"{count:,}", DIM))
    if (more := len(ordered) - MAX_LABELS) > 0:
        table.add_row(Text(f"and {more} more", DIM))
    return table


def _render_example(page: PreflightPage, color: bool) -> RenderableType | None:
    if not page.example and not page.answer:
        return None
    spans = [(escape_terminal(words), learnt) for words, learnt in _shorten(page.example)]
    marks = _unused_brackets("".join(words for words, _ in spans) + page.answer)
    body = Text()
    for words, learnt in spans:
        body += _render_span(words, learnt, color, marks)
    if page.answer:
        body += Text("\nlabel: " if spans else "label: ", DIM) + _render_span(
            escape_terminal(page.answer, escape_newlines=True), True, color, marks
        )
    if not spans:  # an image is not drawn
        return body
    legend = _render_span("learnt", True, color, marks) + Text("   ") + _render_span("only read", False, color, marks)
    return Group(legend, Text(""), body)


def _render_span(text: str, trained: bool, color: bool, brackets: tuple[str, str]) -> Text:
    if color:  # a learnt new line has no colour of its own
        return Text(text.replace("\n", "↵\n") if trained else text, TRAINED if trained else MASKED)
    return Text(brackets[0] + text + brackets[1] if trained else text)


def _unused_brackets(text: str) -> tuple[str, str]:
    """Brackets that the text itself does not hold."""
    for times in range(1, len(text) + 2):
        for left, right in BRACKETS:
            if left * times not in text and right * times not in text:
                return left * times, right * times
    raise AssertionError("a text cannot hold brackets longer than itself")


def _shorten(spans: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Long spans lose their middle: those that are only read first."""
    length = sum(len(words) for words, _ in spans)
    if length <= MAX_EXAMPLE_CHARS:
        return list(spans)
    share = {
        learnt: MAX_EXAMPLE_CHARS / 2 / max(1, sum(kind == learnt for _, kind in spans)) for learnt in (True, False)
    }
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


def _trained_table(page: PreflightPage) -> RenderableType:
    count = page.count
    lines = [
        Text.assemble(
            (f"{count.trainable:,}", HEAD), f" values, {count.percent:.3g} % of the base, {format_bytes(count.bytes)}"
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


def _cost_table(page: PreflightPage) -> RenderableType:
    table = _grid()
    table.add_row(Text("steps", DIM), f"{page.steps:,}")
    if page.memory is not None:
        table.add_row(Text("memory", DIM), f"about {format_bytes(page.memory)}")
    if page.time is not None:
        table.add_row(Text("time", DIM), f"about {format_duration(page.time)}, besides measuring")
    return table


def _warnings_table(messages: Sequence[str]) -> RenderableType | None:
    if not messages:
        return None
    table = _grid()
    for one in messages:
        table.add_row(Text("!", WARN), Text(escape_terminal(one, escape_newlines=True), WARN))
    return table
