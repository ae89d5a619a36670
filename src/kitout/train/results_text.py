"""What is printed when a run is finished: base vs. fine-tuned, what it took, and answers of both.

Made from what results.json holds, so that a finished run can be shown again without a model. Text of the data cannot
act on the terminal. It computes no metric.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from kitout.evaluate.compare import BASE, format_value
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.significance.power import SmallestDifference, smallest_text
from kitout.format import format_bytes, format_duration, single_line
from kitout.train.config.seeds import repeated_adapters
from kitout.train.measure.merge_proof import MergeProof

PAGE_WIDTH = 120
MAX_CELL_CHARS = 160  # characters of a text in a cell
MAX_CLASSES = 12  # with more, only the report shows them one by one
MAX_METRICS = 4  # of each adapter; the report has all


def results_text(results: Mapping[str, Any]) -> str:
    """From results.json; several adapters have their tables one after the other. Empty if there is nothing to show."""
    parts: list[RenderableType] = []
    seeds = results.get("seeds", {})
    repeated = repeated_adapters(seeds.get("adapters", {}))
    comparisons = {name: changes for name, changes in results["comparisons"].items() if name not in repeated}
    for name, changes in comparisons.items():
        baseline = changes[0].get("baseline", BASE)  # a run of an earlier version has none
        title = "The same frozen base, without and with the adapter"
        if baseline != BASE:
            title = f"The adapter on its frozen base, against the {baseline}"
        parts.append(
            _metrics_table(results, name, changes, title if len(results["comparisons"]) == 1 else f"{title} {name}")
        )
        if smallest := _smallest(changes[:MAX_METRICS]):
            parts.append(Text(smallest))
        if 0 < len(scores := results.get("per_class", {}).get(name, ())) <= MAX_CLASSES:
            parts.append(_classes_table(scores))
        examples = results["examples"].get(name, ())
        if examples:
            parts.append(_answers_table(examples, baseline))
    parts += [_section_table(one) for one in results.get("sections", ()) if one["table"]]
    for name, forgotten in results.get("forgetting", {}).items():
        of = f" ({name})" if len(results["forgetting"]) > 1 else ""
        parts.append(Text(f"forgetting{of}: {forgotten['summary']}"))
    for name, proof in results.get("merge", {}).items():
        proof_text = str(MergeProof(**proof))
        parts.append(Text(f"{name}: {proof_text}" if len(results["comparisons"]) > 1 else proof_text))
    if seeds:
        parts.append(Text(f"\n{seeds['text']}"))
    parts += [Text(f"alarm: {alarm}") for alarm in results.get("align", {}).get("alarms", ())]
    page = io.StringIO()
    console = Console(file=page, width=PAGE_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    for part in parts:
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, Text))
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip("\n").split("\n"))


def next_text(results: Mapping[str, Any]) -> str:
    """What one types next, from results.json; empty for a run of an earlier version."""
    steps = results.get("next")
    if not steps:
        return ""
    return "\n".join(
        ["next:", *(f"  {one}" for one in steps["commands"]), "or in Python:", *(f"  {one}" for one in steps["python"])]
    )


def _metrics_table(results: Mapping[str, Any], name: str, changes: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    baseline = changes[0].get("baseline", BASE)
    for heading in ("", baseline, "fine-tuned"):
        table.add_column(heading, justify="right" if heading else "left")
    for number, change in enumerate(changes[:MAX_METRICS]):
        size = f" on {change['base']['n']:,} held-out examples" if number == 0 else ""
        table.add_row(
            metric_title(change["name"], change["tuned"].get("note", "")) + size,
            _value_text(change["base"]),
            _value_text(change["tuned"]),
        )
        if number == 0:
            table.add_row("  95 % confidence interval", _interval_text(change["base"]), _interval_text(change["tuned"]))
            majority = results["majority"].get(name)
            if majority is not None and change["name"] == "accuracy" and baseline != "majority class":
                table.add_row("  always the majority class", f"{format_value(majority, True)} %", "")
    if probe := results.get("probes", {}).get(name):
        table.add_row("  a linear probe of the frozen features", f"{_value_text(probe['base'])}", "")
    table.add_row("trainable parameters", "0", f"{results['trainable'][name]:,}")
    table.add_row("  of the base", "0 %", f"{results['percent'][name]:.2f} %")
    table.add_row("time to train", "", format_duration(results["seconds"]))
    if "processor_seconds" in results:  # a run of an earlier version has none
        table.add_row("  processor time, all threads", "", format_duration(results["processor_seconds"]))
    unit = "images" if "images_per_second" in results else "tokens"
    speed = results[f"{unit}_per_second"]
    table.add_row(f"  {unit} per second", "", f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}")
    table.add_row("peak memory", "", format_bytes(results["memory"]))
    return table


def _smallest(changes: Sequence[Mapping[str, Any]]) -> str:
    """The line below the metrics; empty for a run of an earlier version, which has no such values."""
    known = [one for one in changes if one.get("smallest") and one["smallest"]["value"] is not None]
    return smallest_text([(metric_title(one["name"]), SmallestDifference(**one["smallest"])) for one in known])


def _classes_table(scores: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Class by class, on the test split (%)", title_justify="left", header_style="bold")
    for heading in ("class", "examples", "recall", "95 % interval", "precision", "F1"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for one in scores:
        interval = f"{format_value(one['low'], True)} to {format_value(one['high'], True)}" if one["n"] else ""
        recall, precision, f1 = (format_value(one[name], True) for name in ("recall", "precision", "f1"))
        table.add_row(Text(single_line(one["name"], 40)), f"{one['n']:,}", recall, interval, precision, f1)
    return table


def _section_table(section: Mapping[str, Any]) -> Table:
    """Of the kind of run."""
    table = Table(title=section["title"], title_justify="left", header_style="bold")
    head, *rows = section["table"]
    for number, heading in enumerate(head):
        is_text = number == 0 or len(head) == 2
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(single_line(cell, MAX_CELL_CHARS)) for cell in row))
    return table


def _answers_table(examples: Sequence[Mapping[str, Any]], baseline: str) -> Table:
    table = Table(
        title="Answers of both, on held-out examples selected by rule", title_justify="left", header_style="bold"
    )
    for heading in ("prompt", "reference", baseline, "fine-tuned"):
        table.add_column(heading, overflow="fold")
    prompts = _strip_common_lines([one["prompt"] for one in examples])
    for prompt, one in zip(prompts, examples, strict=True):
        table.add_row(
            *(Text(single_line(text, MAX_CELL_CHARS)) for text in (prompt, one["reference"], one["base"], one["tuned"]))
        )
    return table


def _strip_common_lines(prompts: Sequence[str]) -> list[str]:
    """Without the lines that all of them begin and end with: an instruction, the tags of a chat template."""
    rows = [prompt.split("\n") for prompt in prompts]
    if len(rows) < 2:
        return list(prompts)
    start = _num_common_lines(rows)
    end = min(_num_common_lines([row[::-1] for row in rows]), min(map(len, rows)) - start)
    stripped = ["\n".join(row[start : len(row) - end]) for row in rows]
    return stripped if all(stripped) else list(prompts)


def _num_common_lines(rows: Sequence[Sequence[str]]) -> int:
    """How many lines all rows begin with."""
    return sum(1 for _ in takewhile(lambda lines: len(set(lines)) == 1, zip(*rows, strict=False)))


def _value_text(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "not finite"
    return format_value(score["value"], score["share"]) + (" %" if score["share"] else "")


def _interval_text(score: Mapping[str, Any]) -> str:
    if score["low"] is None or score["high"] is None:
        return "not finite"
    return f"{format_value(score['low'], score['share'])} to {format_value(score['high'], score['share'])}"
