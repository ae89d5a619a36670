"""A run's config from a file and from overrides of the command line: `train.lr=1e-4 method.rank=16 jobs.0.data=x`.

Values are YAML; an override inside a shorthand (`model: NAME`, `data: PATH`, `method: IA3`) expands it first. It knows
names and values, no meaning. Kept by hand and not pydantic-settings' CliApp, because all errors, the
config's own included, are reported together.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from kitout.errors import ConfigError, Errors
from kitout.format import short_repr
from kitout.train.config import yaml_file
from kitout.train.config.load import check, has_method_names_alone, load
from kitout.train.config.plain_values import MAX_DEPTH
from kitout.train.config.schema import RunConfig

SETTING_NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*", re.ASCII)

# A plain value in place of settings: {location, with * for a number: the setting it is short for}.
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
Config = TypeVar("Config")


def is_override(text: str) -> bool:
    """Whether a word of a command line is an override and not a file."""
    name, equals, _ = text.partition("=")
    return bool(equals) and (SETTING_NAME_PATTERN.fullmatch(name) is not None or not text.endswith((".yaml", ".yml")))


def parse_override(text: str) -> Override:
    """`train.lr=1e-4` -> ("train.lr", 0.0001). What YAML cannot read is taken as it stands (`path=*.jsonl`)."""
    name, _, value = text.partition("=")
    if SETTING_NAME_PATTERN.fullmatch(name) is None:
        raise ConfigError(f"{text!r}: a setting is written name=value, with a name such as train.lr")
    try:
        return name, yaml_file.parse_yaml(value, text)
    except ConfigError:
        if value.lstrip()[:1] in tuple("[{\"'"):
            raise
        return name, value


def build_config(
    file: Path | None, overrides: Iterable[Override | str], log: Callable[[str], None] | None = None
) -> RunConfig:
    """The run that a file (None: none) and overrides describe; the later wins. ConfigError names every error.

    log: as `load` has it.
    """
    values = yaml_file.read_yaml(file) if file is not None else {}
    return build(values, overrides, lambda values: load(values, log), check, SHORTHANDS)


def build(
    values: Mapping[str, Any],
    overrides: Iterable[Override | str],
    load: Callable[[Mapping[str, Any]], Config],
    check: Callable[[Mapping[str, Any]], None],
    shorthands: Mapping[str, str],
) -> Config:
    """The same of any config. load, check: as those of a run. shorthands: as SHORTHANDS."""
    errors = Errors(ConfigError, "the run's config")
    for override in overrides:
        try:
            name, value = parse_override(override) if isinstance(override, str) else override
            values = apply_override(values, name, value, shorthands)
        except ConfigError as error:
            errors.add(str(error))
    if not errors.messages:
        return load(values)
    try:
        # What is wrong already is reported without torch, if the methods have no settings that need it.
        check(values) if has_method_names_alone(values) else load(values)
    except ConfigError as error:
        _, *messages = str(error).split("\n  - ")
        for message in messages or [str(error)]:
            errors.add(message)
    errors.raise_if_any()
    raise AssertionError  # there is at least one


def apply_override(
    values: Mapping[str, Any], name: str, value: Any, shorthands: Mapping[str, str] = SHORTHANDS
) -> dict[str, Any]:
    """A copy of plain values with one more. An entry of a list is named by its number, or by the name it has."""
    result: dict[str, Any] = copy.deepcopy(dict(values))
    container: Any = result
    parts = name.split(".")
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"{name[:80]}...: a name of {len(parts):,} parts; no setting is so deep")
    location = ""
    for part, next_part in pairwise(parts):
        number = str(_index(container, part, name)) if isinstance(container, list) else part
        location = f"{location}.{number}" if location else number
        inner = _get(container, part, name)
        if not isinstance(inner, dict | list):
            inner = _expand(inner, location, name, shorthands)
        elif isinstance(inner, list) and not next_part.isdigit() and next_part not in _entry_names(inner):
            inner = _single_entry(inner, location, name, shorthands)
        _set(container, part, inner, name)
        container = inner
    _set(container, parts[-1], value, name)
    return result


def _expand(shorthand: Any, location: str, name: str, shorthands: Mapping[str, str]) -> dict[str, Any]:
    if shorthand is None:
        return {}
    key = shorthands.get(re.sub(r"\.\d+(?=\.|$)", ".*", location))
    if key is None:
        raise ConfigError(f"{name}: {location} is {short_repr(shorthand)}, which holds no settings")
    return {key: shorthand}


def _single_entry(entries: list[Any], location: str, name: str, shorthands: Mapping[str, str]) -> Any:
    """The one entry of a list, whose number may be left out: data.train.limit=100."""
    if len(entries) == 1 and isinstance(entries[0], str | dict):
        return entries[0] if isinstance(entries[0], dict) else _expand(entries[0], f"{location}.0", name, shorthands)
    known = ", ".join(filter(None, _entry_names(entries)))
    hint = f"{location}.0" + (f", or by name ({known})" if known else "")
    raise ConfigError(f"{name}: {location} is a list of {len(entries)}; choose one, for example {hint}")


def _entry_names(entries: list[Any]) -> list[str]:
    """By entry its name, or the kind that names it; "" where it has none."""
    return [str(one.get("name") or one.get("kind") or "") if isinstance(one, dict) else "" for one in entries]


def _get(container: Any, key: str, name: str) -> Any:
    return container[_index(container, key, name)] if isinstance(container, list) else container.get(key)


def _set(container: Any, key: str, value: Any, name: str) -> None:
    if isinstance(container, list):
        container[_index(container, key, name)] = value
    else:
        container[key] = value


def _index(entries: list[Any], key: str, name: str) -> int:
    names = _entry_names(entries)
    if not key.isdigit() and names.count(key) == 1:
        return names.index(key)
    if not key.isdigit() or len(key) > 9 or int(key) >= len(entries):
        known = f"0 to {len(entries) - 1}" if entries else "none"
        known += f": {', '.join(names)}" if any(names) else ""
        raise ConfigError(f"{name}: there is no entry {short_repr(key)} (there are {known})")
    return int(key)
