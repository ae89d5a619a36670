"""The pre-flight page: what is about to be trained on, with what, at what cost, and what looks wrong about it.

Rendered in color on a terminal, in plain text elsewhere, and saved in the run's folder as preflight.txt and .json. Text
from the data cannot act on the terminal nor be taken for a bracket of the page. It knows statistics, no model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
MAX_EXAMPLE_CHARS = 1400  # of the shown example
MAX_NOTE_CHARS = 500  # of what the adapter does not reach
MAX_SPANS = 40  # of the shown example
MAX_LABELS = 12  # classes shown, the most frequent first
TRAINED, MASKED, HEAD, DIM, WARN = "bold green", "dim", "bold", "dim", "yellow"
BRACKETS = (("«", "»"), ("⟦", "⟧"), ("❮", "❯"), ("[[", "]]"))
BLOCKS = "▏▎▍▌▋▊▉█"
# What preflight.json calls the fields of the data's statistics.
STATISTICS_KEYS = {
    "splits": "parts",
    "trained_percent": "percent",
    "num_examples": "examples",
    "num_tokens": "tokens",
    "num_targets": "learned",
    "histogram": "bins",
    "max_length": "longest",
    "longest_location": "longest_place",
    "num_truncated": "cut",
    "num_truncated_tokens": "cut_tokens",
    "num_truncated_targets": "lost",
    "num_without_targets": "empty",
    "label_counts": "labels",
    "value_range": "values",
}


@dataclass(frozen=True)
class PreflightPage:
    """What is shown of one job."""

    settings: Mapping[str, str]
    """What is chosen and why, in words."""
    facts: DataStatistics
    """Of its data."""
    example: Sequence[tuple[str, bool]]
    """Spans of one example and whether they are trained on (`render_spans`)."""
    answer: str
    """The example's label or number, if it has one."""
    count: ParameterCount
    """Parameters of the adapter."""
    sites: Sequence[tuple[str, str, str, str]]
    """Rows of role, layers, widths, number of sites (`runtime.show.site_table`)."""
    steps: int
    """Optimizer steps."""
    left_out: Sequence[str] = ()
    """What the adapter does not reach, a line each."""
    memory: int | None = None
    """Estimated peak in bytes; None: left out, since the page of the last job has it for all."""
    time: float | None = None
    """Estimated seconds of training; None: likewise."""
    warnings: Sequence[str] = ()
    """Besides those of the data."""
    rejected: Sequence[tuple[str, bool]] = ()
    """Of a pair, whose chosen answer is the example: spans of its rejected answer."""


def print_page(page: PreflightPage, console: Console | None = None) -> None:
    """On the console: in color where it has any, and nowhere wider than a page."""
    console = console or Console()
    if not console.is_terminal:  # a file has no width of its own
        console.print(page_text(page), markup=False, highlight=False, soft_wrap=True, end="")
        return
    color = console.color_system is not None and not console.no_color
    console.print(render(page, color), width=min(console.width, PAGE_WIDTH))


def save_pages(pages: Sequence[PreflightPage], folder: Path) -> None:
    """preflight.json for machines (a list if there are several jobs), preflight.txt for people."""
    json_file, text_file = PREFLIGHT_FILES
    values: list[Any] = []
    for page in pages:
        fields = asdict(page)
        facts = {STATISTICS_KEYS.get(name, name): value for name, value in fields["facts"].items()}
        facts["parts"] = [_without_empty({STATISTICS_KEYS.get(k, k): v for k, v in split.items()}, "num_dropped")
                          for split in facts["parts"]]  # fmt: skip
        facts = _without_empty(facts, "answers")
        values.append(to_json_value(_without_empty(fields, "rejected") | {"facts": facts}))
    content = json.dumps(values[0] if len(values) == 1 else values, indent=2, ensure_ascii=False)
    write_text(folder / json_file, content + "\n")
    write_text(folder / text_file, "\n".join(map(page_text, pages)))


def _without_empty(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Without a field that only some data have, where it is empty."""
    return {key: value for key, value in fields.items() if key != name or value}


def page_text(page: PreflightPage) -> str:
    """Without colors: brackets instead."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=PAGE_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(render(page, color=False))
    return "\n".join(line.rstrip() for line in buffer.getvalue().split("\n"))


def render(page: PreflightPage, color: bool) -> RenderableType:
    """The whole page, section by section."""
    parts: list[RenderableType] = [_settings_table(page)]
    for title, body in (
        ("data", _data_table(page.facts)),
        ("lengths of the train split, in tokens", _histogram(page.facts.train.histogram)),
        *(
            (f"{of_name.name} answers of the train split, in tokens", _histogram(of_name.histogram))
            for of_name in page.facts.answers
        ),
        ("labels of the train split", _labels_table(page.facts.train)),
        ("one example: the chosen answer" if page.rejected else "one example", _render_example(page, color)),
        ("its rejected answer", _render_example(replace(page, example=page.rejected, answer=""), color)),
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
    has_tokens = any(split.num_tokens for split in statistics.splits)
    has_dropped = any(split.num_dropped for split in statistics.splits)
    names = ["", "examples", *(["tokens", "trained", "median", "90 %", "longest", "truncated"] if has_tokens else [])]
    names += ["dropped"] if has_dropped else []
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    for split in statistics.splits:
        percent = split.trained_percent
        trained = "-" if percent is None else f"{format_count(split.num_targets)} ({percent:.3g} %)"
        median, percentile_90 = (split.quantiles[QUANTILES.index(q)] for q in (0.5, 0.9))
        cells = [
            format_count(split.num_tokens),
            trained,
            f"{median:,}",
            f"{percentile_90:,}",
            f"{split.max_length:,}",
            f"{split.num_truncated:,}",
        ]
        cells = (cells if has_tokens else []) + ([f"{split.num_dropped:,}"] if has_dropped else [])
        table.add_row(Text(single_line(split.name)), f"{split.num_examples:,}", *cells)
    longest = max(statistics.splits, key=lambda split: split.max_length)
    if not has_tokens or not longest.longest_location:
        return table
    return Group(table, Text(f"the longest: {single_line(longest.longest_location)}", DIM))


def _histogram(histogram: Sequence[tuple[int, int, int]]) -> RenderableType | None:
    if not histogram:
        return None
    table = _grid(0, 2, columns=3)
    max_count = max(count for *_, count in histogram)
    for low, high, count in histogram:
        label = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        table.add_row(Text(label, DIM), Text(bar(count, max_count), "cyan"), Text(f"{count:,}" if count else "", DIM))
    return table


def bar(count: int, max_count: int) -> str:
    """At most MAX_BAR_WIDTH wide, in eighths; anything above 0 shows."""
    eighths = max(1, round(8 * MAX_BAR_WIDTH * count / max_count)) if count else 0
    full, rest = divmod(eighths, 8)
    return ("█" * full + (BLOCKS[rest - 1] if rest else "")).ljust(MAX_BAR_WIDTH)


def _labels_table(split: SplitStatistics) -> RenderableType | None:
    if split.value_range is not None:
        smallest, mean, largest = split.value_range
        return Text(f"from {smallest:.4g} to {largest:.4g}, {mean:.4g} on average")
    if not split.label_counts:
        return None
    table = _grid(2, columns=3)
    ordered = sorted(split.label_counts.items(), key=lambda pair: -pair[1])
    max_count = max(1, ordered[0][1])
    for name, count in ordered[:MAX_LABELS]:
        table.add_row(Text(single_line(name, 40)), Text(bar(count, max_count), "cyan"), Text(f"{count:,}", DIM))
    if (more := len(ordered) - MAX_LABELS) > 0:
        table.add_row(Text(f"and {more} more", DIM))
    return table


def _render_example(page: PreflightPage, color: bool) -> RenderableType | None:
    if not page.example and not page.answer:
        return None
    spans = [(escape_terminal(text), is_trained) for text, is_trained in _shorten(page.example)]
    brackets = _unused_brackets("".join(text for text, _ in spans) + page.answer)
    body = Text()
    for text, is_trained in spans:
        body += _render_span(text, is_trained, color, brackets)
    if page.answer:
        answer = escape_terminal(page.answer, escape_newlines=True)
        body += Text("\nlabel: " if spans else "label: ", DIM) + _render_span(answer, True, color, brackets)
    if not spans:  # an image is not shown
        return body
    legend = _render_span("trained on", True, color, brackets) + Text("   ")
    legend += _render_span("context only", False, color, brackets)
    return Group(legend, Text(""), body)


def _render_span(text: str, is_trained: bool, color: bool, brackets: tuple[str, str]) -> Text:
    if color:  # a trained new line has no color of its own
        return Text(text.replace("\n", "↵\n") if is_trained else text, TRAINED if is_trained else MASKED)
    return Text(brackets[0] + text + brackets[1] if is_trained else text)


def _unused_brackets(text: str) -> tuple[str, str]:
    """Brackets that are not in the text itself."""
    for times in range(1, len(text) + 2):
        for left, right in BRACKETS:
            if left * times not in text and right * times not in text:
                return left * times, right * times
    raise AssertionError("a text cannot hold brackets longer than itself")


def _shorten(spans: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Long spans lose their middle; trained ones and the others share the characters equally."""
    if sum(len(text) for text, _ in spans) <= MAX_EXAMPLE_CHARS:
        return list(spans)
    max_chars = {
        is_trained: max(40, int(MAX_EXAMPLE_CHARS / 2 / max(1, sum(kind == is_trained for _, kind in spans))))
        for is_trained in (True, False)
    }
    shortened: list[tuple[str, bool]] = []
    for text, is_trained in spans[:MAX_SPANS]:
        limit = max_chars[is_trained]
        if len(text) > limit:
            left_out = len(text) - limit
            text = f"{text[: limit // 2]} ... ({left_out:,} characters) ... {text[-(limit - limit // 2) :]}"
        shortened.append((text, is_trained))
    if len(spans) > MAX_SPANS:
        shortened.append((f" ... ({len(spans) - MAX_SPANS} more spans)", False))
    return shortened


def _trained_table(page: PreflightPage) -> RenderableType:
    count = page.count
    summary = f" trainable parameters, {count.percent:.3g} % of the base, {format_bytes(count.bytes)}"
    lines = [Text.assemble((f"{count.trainable:,}", HEAD), summary)]
    if count.heads:
        lines.append(Text(f"{count.heads:,} of them in newly initialized heads", DIM))
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=DIM, show_edge=False)
    for name in ("role", "layers", "in -> out", "sites"):
        table.add_column(name, justify="right" if name == "sites" else "left")
    for row in page.sites:
        table.add_row(*(Text(cell) for cell in row))
    notes = [Text(single_line(line, MAX_NOTE_CHARS), WARN) for line in page.left_out]
    return Group(*lines, *([table] if page.sites else []), *notes)


def _cost_table(page: PreflightPage) -> RenderableType:
    table = _grid()
    table.add_row(Text("steps", DIM), f"{page.steps:,}")
    if page.memory is not None:
        table.add_row(Text("memory", DIM), f"about {format_bytes(page.memory)}")
    if page.time is not None:
        table.add_row(Text("time", DIM), f"about {format_duration(page.time)}, without evaluations")
    return table


def _warnings_table(messages: Sequence[str]) -> RenderableType | None:
    if not messages:
        return None
    table = _grid()
    for message in messages:
        table.add_row(Text("!", WARN), Text(escape_terminal(message, escape_newlines=True), WARN))
    return table
