"""A stage of reinforcement on its pages: its first and last round as a table, all rounds as charts.

It knows rows of metrics.jsonl, and neither models nor runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kitout.align.pages.round_charts import PANELS, REWARD, round_charts
from kitout.evaluate.report.section import Section
from kitout.format import format_number

CAPTION = (
    "Of the answers that were sampled to train on; rewards with the 95 % interval over prompts. Answers to held-out "
    "prompts are compared above."
)


def rounds_section(rows: Sequence[Mapping[str, Any]]) -> Section | None:
    """None where nothing was logged of a round."""
    logged = [
        {key.rpartition("/")[2]: value for key, value in row.items() if isinstance(value, int | float)}
        for row in rows
        if isinstance(row.get(REWARD), int | float)
    ]
    if not logged:
        return None
    first, last = logged[0], logged[-1]
    known = dict.fromkeys([*first, *last])  # a source may judge no answer of a round
    names = [name for name in known if name == REWARD or name.startswith(f"{REWARD}_")]
    names = [name for name in names if not name.endswith(("_low", "_high"))]
    table = [("sampled answers", "first round", "last round")]
    for name in names:
        title = "reward" if name == REWARD else f"reward, {name.removeprefix(f'{REWARD}_')}"
        table.append((title, reward_text(first, name), reward_text(last, name)))
    for name, (title, factor) in PANELS.items():
        if name in first or name in last:
            table.append((title, _text(first.get(name), factor), _text(last.get(name), factor)))
    return Section(title="Rounds of sampled answers", table=table, caption=CAPTION, charts=round_charts(rows))


def reward_text(row: Mapping[str, Any], name: str) -> str:
    """0.52 (0.4 to 0.63)"""
    if name not in row:
        return ""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    interval = "" if low is None or high is None else f" ({format_number(low)} to {format_number(high)})"
    return f"{format_number(row[name])}{interval}"


def _text(value: Any, factor: float) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{factor * value:.1f}" if factor != 1 else format_number(value)
