"""metrics.jsonl: one JSON object per logged step, flushed at once, so a kill loses at most an incomplete last line.

When a run resumes from a checkpoint, the lines after its step are removed: no step is there twice. It knows no trainer
and no screen.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kitout.files.atomic import write_text

METRICS_FILE = "metrics.jsonl"
FINAL_KEY = "train_runtime"  # only in what Trainer logs once, at the end of training


class MetricsLog:
    """The file, written by one process."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lines_before_start: list[dict[str, Any]] | None = []  # written before training began

    def resume_at(self, first_step: int) -> None:
        """Training starts after `first_step` steps. 0: a new file, with only what this process has written before."""
        own = self._lines_before_start or []
        earlier = read_metrics(self.file)[: -len(own) or None]  # by an earlier process
        kept = own
        if first_step:
            kept = [line for line in earlier if _step_of(line) <= first_step and FINAL_KEY not in line]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, "".join(_json_line(line) for line in kept))
        self._lines_before_start = None

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one line; returns it, as JSON values."""
        line = {"step": step} | {name: to_json_value(value) for name, value in values.items() if name != "step"}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            text = ("" if _ends_with_newline(self.file) else "\n") + _json_line(line)
            file.write(text.encode())  # one write: a reader sees the whole line or none of it
        if self._lines_before_start is not None:
            self._lines_before_start.append(line)
        return line


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that a kill left incomplete."""
    return list(_read_lines(file)) if file.is_file() else []


def to_json_value(value: Any) -> Any:
    """As a JSON value, inside mappings and lists too: nan and inf become null, unknown types text."""
    if isinstance(value, torch.Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): to_json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(inner) for inner in value]
    return str(value)


def _json_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    for text in file.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:  # incomplete, or empty
            continue
        if isinstance(line, dict):
            yield line


def _step_of(line: Mapping[str, Any]) -> float:
    step = line.get("step")
    return step if isinstance(step, int | float) else math.inf


def _ends_with_newline(file: Path) -> bool:
    """Whether the file is empty or its last line is complete."""
    with file.open("rb") as lines:
        if lines.seek(0, os.SEEK_END) == 0:
            return True
        lines.seek(-1, os.SEEK_END)
        return lines.read(1) == b"\n"
