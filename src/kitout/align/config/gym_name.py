"""`gym:NAME:setting=value:...`: a task of reasoning-gym and its settings, as data and rewards write them.

The separator is a colon because shells and YAML leave it alone. A value is read as JSON (2, 0.5, true, [1, 2]), all
else as text; `#500` behind it, as behind other data: so many prompts. Text becomes data here and nothing else: which
tasks and settings there are is the package's business (`rewards.gym_tasks`). A name is an identifier and never becomes
part of a path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kitout.errors import ConfigError
from kitout.format import short_repr

GYM = "gym:"
EXAMPLE = "gym:chain_sum or gym:chain_sum:max_terms=2:max_digits=2"
OWN_SETTINGS = {"size": "data.train.limit", "seed": "data.seed"}  # of reasoning-gym -> what sets them here


@dataclass(frozen=True)
class GymName:
    """A task with its settings."""

    task: str
    """Its name in reasoning-gym."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the task, over its defaults."""
    size: int | None = field(default=None, compare=False)
    """Prompts that are made of it; None: the text does not say."""


def is_gym(text: str) -> bool:
    """Whether a text names a task of reasoning-gym, right or wrong."""
    return text.startswith(GYM)


def parse_gym(text: str) -> GymName:
    """ConfigError for what is no identifier, has no value or is set twice, and for what kitout itself sets."""
    named, _, size = text.partition("#")
    task, *pairs = named.removeprefix(GYM).split(":")
    if "#" in text and not (size.isdecimal() and int(size)):
        raise ConfigError(f"{short_repr(text)}: {size!r} is no number of prompts: write as in gym:chain_sum#500")
    if not task.isidentifier():
        raise ConfigError(f"{short_repr(text)} names no task of reasoning-gym: write as in {EXAMPLE}")
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (separator and value and name.isidentifier()):
            raise ConfigError(f"{short_repr(text)}: {pair!r} is no setting=value: write as in {EXAMPLE}")
        if name in settings:
            raise ConfigError(f"{short_repr(text)}: {name} is set twice")
        if name in OWN_SETTINGS:
            raise ConfigError(f"{short_repr(text)}: {name} is set by {OWN_SETTINGS[name]}: leave it out here")
        settings[name] = _read_value(value)
    return GymName(task, settings, int(size) if size else None)


def _read_value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if value is None or isinstance(value, dict) else value
