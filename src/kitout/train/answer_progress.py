"""How a run that samples answers is displayed: a few values of its rounds, where they were and where they are.

A line has what decides whether it goes well (reward, KL, entropy, length, clipping); the panel the same as a table of
the first round and the last. What else is logged is in metrics.jsonl. It knows names of values, and no run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from kitout.format import format_number

REWARD, LENGTH = "reward", "answer_tokens"  # a run that logs both samples answers
COLUMNS = {  # name -> (title, factor: 100 for percent)
    REWARD: ("reward", 1), "kl_to_reference": ("KL", 1), "kl": ("KL penalty", 1), "entropy": ("entropy", 1),
    LENGTH: ("length", 1),
    "ended": ("ended", 100), "clip_fraction": ("clipped", 100), "explained_variance": ("explained", 1),
    "groups_without_spread": ("no spread", 100), "unjudged": ("unjudged", 100),
}  # fmt: skip
IN_A_LINE = (REWARD, "kl_to_reference", "kl", "entropy", LENGTH, "clip_fraction", "explained_variance")
WHERE_NOT_ZERO = ("groups_without_spread", "unjudged")  # of no interest while nothing is wrong


def samples_answers(values: Mapping[str, Any]) -> bool:
    """Whether these logged values are a round's."""
    return REWARD in values and LENGTH in values


def answer_texts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of what one line says."""
    found = _of_any_job(values)
    names = [*(name for name in IN_A_LINE if name in found), *(name for name in WHERE_NOT_ZERO if found.get(name))]
    return [(COLUMNS[name][0], _text(name, found)) for name in names]


def answers_table(first: Mapping[str, Any], last: Mapping[str, Any]) -> Table:
    """A row for the first round and one for the last."""
    start, now = _of_any_job(first), _of_any_job(last)
    names = [name for name in COLUMNS if name in now and (name not in WHERE_NOT_ZERO or now[name] or start.get(name))]
    names += [name for name in now if name.startswith(f"{REWARD}_") and not name.endswith(("_low", "_high"))]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for name in names:
        table.add_column(COLUMNS[name][0] if name in COLUMNS else name.removeprefix(f"{REWARD}_"), justify="right")
    for title, row in (("first", start), ("now", now)):
        table.add_row(title, *(_text(name, row) for name in names))
    return table


def _of_any_job(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run with a value adapter logs what is the policy's under its name."""
    return {key.rpartition("/")[2]: value for key, value in values.items() if isinstance(value, int | float)}


def _text(name: str, values: Mapping[str, Any]) -> str:
    value, factor = values.get(name), COLUMNS[name][1] if name in COLUMNS else 1
    if value is None:
        return ""
    if factor == 100:
        return f"{100 * value:.0f} %"
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    if low is None or high is None or not math.isfinite(high - low):
        return _short(value)
    return f"{_short(value)} ({_short(low)} to {_short(high)})"


def _short(value: float) -> str:
    """Three digits: a glance is enough."""
    return format_number(float(f"{value:.3g}"))
