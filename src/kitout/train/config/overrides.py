"""A run's config from a file and from what is said on the command line: `train.lr=1e-4 method.rank=16 jobs.0.data=x`.

Values are YAML; a setting below something written short (`model: NAME`, `data: PATH`, `method: IA3`) writes it out
first. It knows names and values, no meaning. Kept by hand and not pydantic-settings' CliApp, because all errors, the
config's own included, are reported together.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kitout.errors import ConfigError, Errors
from kitout.train.config import yaml_file
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig

SETTING_NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*", re.ASCII)

# What stands where settings may stand: {where, with * for a number: the setting it is short for}.
SHORTHANDS = {
    "model": "name",
    "method": "name",
    "jobs.*.method": "name",
    "data": "train",
    "jobs.*.data": "train",
    "data.train": "path",
    "data.train.*": "path",
    "jobs.*.data.train": "path",
    "jobs.*.data.train.*": "path",
}

Override = tuple[str, Any]  # dotted name, plain value


def is_override(text: str) -> bool:
    """Whether a word of a command line is an override and not a file."""
    name, equals, _ = text.partition("=")
    return bool(equals) and (SETTING_NAME_PATTERN.fullmatch(name) is not None or not text.endswith((".yaml", ".yml")))


def parse_override(text: str) -> Override:
    """`train.lr=1e-4` -> ("train.lr", 0.0001). What YAML cannot read is taken as it stands (`path=*.jsonl`)."""
    name, _, words = text.partition("=")
    if SETTING_NAME_PATTERN.fullmatch(name) is None:
        raise ConfigError(f"{text!r}: a setting is written name=value, with a name such as train.lr")
    try:
        return name, yaml_file.parse_yaml(words, text)
    except ConfigError:
        if words.lstrip()[:1] in tuple("[{\"'"):
            raise
        return name, words


def build_config(file: Path | None, overrides: Iterable[Override | str]) -> RunConfig:
    """The run that a file (None: none) and overrides describe; the later wins. ConfigError tells every fault."""
    values = yaml_file.read_yaml(file) if file is not None else {}
    faults: list[str] = []
    for one in overrides:
        try:
            name, value = parse_override(one) if isinstance(one, str) else one
            values = apply_override(values, name, value)
        except ConfigError as wrong:
            faults.append(str(wrong))
    try:
        made = load(values)
    except ConfigError as wrong:
        if not faults:
            raise
        _, *listed = str(wrong).split("\n  - ")
        faults += listed or [str(wrong)]
    if faults:
        found = Errors(ConfigError, "the run's config")
        for fault in faults:
            found.add(fault)
        found.raise_if_any()
    return made


def apply_override(values: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of plain values with one more."""
    fresh: dict[str, Any] = copy.deepcopy(dict(values))
    held: Any = fresh
    *above, last = name.split(".")
    for depth, part in enumerate(above):
        where = ".".join(above[: depth + 1])
        inner = _get(held, part, name)
        if not isinstance(inner, dict | list):
            inner = _expand(inner, where, name)
        elif isinstance(inner, list) and not _next_name(above, depth, last).isdigit():
            inner = _single_entry(inner, where, name)
        _set(held, part, inner, name)
        held = inner
    _set(held, last, value, name)
    return fresh


def _next_name(above: list[str], depth: int, last: str) -> str:
    return above[depth + 1] if depth + 1 < len(above) else last


def _expand(shorthand: Any, location: str, name: str) -> dict[str, Any]:
    if shorthand is None:
        return {}
    key = SHORTHANDS.get(re.sub(r"\.\d+(?=\.|$)", ".*", location))
    if key is None:
        raise ConfigError(f"{name}: {location} is {shorthand!r}, which holds no settings")
    return {key: shorthand}


def _single_entry(entries: list[Any], location: str, name: str) -> Any:
    """A setting of the one entry of a list: data.train.limit=100."""
    if len(entries) == 1 and isinstance(entries[0], str | dict):
        return entries[0] if isinstance(entries[0], dict) else _expand(entries[0], f"{location}.0", name)
    raise ConfigError(f"{name}: {location} is a list of {len(entries)}; say which, for example {location}.0")


def _get(container: Any, key: str, name: str) -> Any:
    return container[_index(container, key, name)] if isinstance(container, list) else container.get(key)


def _set(container: Any, key: str, value: Any, name: str) -> None:
    if isinstance(container, list):
        container[_index(container, key, name)] = value
    else:
        container[key] = value


def _index(entries: list[Any], key: str, name: str) -> int:
    if not key.isdigit() or int(key) >= len(entries):
        there = f"0 to {len(entries) - 1}" if entries else "none"
        raise ConfigError(f"{name}: {key!r} is no number of an entry there is ({there})")
    return int(key)
