"""What to write where data of alignment (pairs, judged answers, prompts) are given to plain training.

The line of `kitout align` that takes such data, and the settings that train on the answers as they are. It knows how a
table is read and its first row, and nothing of alignment itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from kitout.data.examples.column_hints import yaml_text
from kitout.data.examples.format_table import STAGES
from kitout.data.examples.formats import TableReading
from kitout.data.read.json_text import parse_json
from kitout.errors import DataError, UnusableFormat

ANSWERS = {"preference": ("chosen", "the chosen answers"), "unpaired": ("completion", "all answers, wanted or not,")}


def refuse_for_training(error: UnusableFormat, path: str) -> DataError:
    """The same error with the line to write. path: of the data."""
    reading: TableReading = error.reading
    kind = reading.format.kind
    reward = " --reward module:function" if kind == "prompts" else ""
    line = f"kitout align {STAGES[kind]} --model M --data {shlex.quote(path)}{reward} --out DIR"
    message = f"{error}\n  to align a model on them: {line}"
    if kind in ANSWERS:
        role, answers = ANSWERS[kind]
        settings = _settings(reading, error.row, role)
        message += f"\n  to train on {answers} alone: {settings}" if settings else ""
    return DataError(message)


def _settings(reading: TableReading, row: Mapping[str, Any], role: str) -> str:
    """The format and columns that read the answers as examples to train on; "" where none does."""
    answer, prompt = reading.columns[role], reading.columns.get("prompt")
    roles = _roles(
        _messages(row.get(answer)), _messages(row.get(prompt)) if prompt is not None else None, answer, prompt
    )
    if reading.format.name.startswith("raw_") and prompt is not None:
        roles = {"format": "completion", "prompt": prompt, "completion": answer}
    name = roles.pop("format", "")
    settings = [f"data.train.columns.{role}={yaml_text(column)}" for role, column in roles.items()]
    return " ".join(map(shlex.quote, [f"data.train.format={name}", *settings])) if name else ""


def _roles(answers: list[Any] | None, prompts: list[Any] | None, answer: str, prompt: str | None) -> dict[str, str]:
    """answers, prompts: the messages of a cell; None: it is a text."""
    if answers is not None:
        first = answers[0] if answers else {}
        if isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt"):
            return {"format": "messages", "messages": answer}
        is_pair = prompts is not None and prompt is not None
        return {"format": "completion", "prompt": prompt or "", "completion": answer} if is_pair else {}
    if prompt is None:
        return {"format": "text", "text": answer}
    return {"format": "instruction", "instruction": prompt, "response": answer} if prompts is None else {}


def _messages(cell: Any) -> list[Any] | None:
    if isinstance(cell, str) and cell.lstrip().startswith("[{"):
        try:
            cell = parse_json(cell)
        except DataError:
            return None
    return cell if isinstance(cell, list) else None
