"""What the adapters of finished runs have forgotten, as a table of a page: no study of its own.

It reads the section `forgetting` of results.json, and knows no model and no task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from kitout.format import align_columns

CHOICES, TEXTS, CHAT = "acc", "wiki", "chat prompts (chat template)"
TITLE = (
    "Forgetting, the quick suite against the base, 95 % intervals. Questions: the mean change of its sets of choices; "
    "chat prompts: bits per byte."
)
HEAD = ("adapter", "questions, points", "wiki, bits per byte", "wiki, KL per token", "chat prompts", "lost on")


def forgetting_lines(runs: Mapping[str, Path]) -> list[str]:
    """A row for each adapter of these run folders, behind the folder's name; none where no run has measured it."""
    rows: list[tuple[str, ...]] = [HEAD]
    for name, folder in runs.items():
        measured = json.loads((folder / "results.json").read_text(encoding="utf-8")).get("forgetting") or {}
        rows += [_row(f"{name} {adapter}".strip(), one["sets"]) for adapter, one in measured.items()]
    if len(rows) == 1:
        return []
    return [TITLE, "", "```text", *align_columns(rows), "```", ""]


def _row(name: str, sets: Mapping[str, Any]) -> tuple[str, ...]:
    points = 100 * fmean(one["difference"] for one in sets.values() if one["metric"] == CHOICES)
    lost = ", ".join(key for key, one in sets.items() if one["verdict"] == "lost") or "-"
    return name, f"{points:+.1f}", _change(sets[TEXTS]), f"{sets[TEXTS]['kl']:.2f}", _change(sets[CHAT]), lost


def _change(one: Mapping[str, Any]) -> str:
    return f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
