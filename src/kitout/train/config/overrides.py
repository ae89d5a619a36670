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

from kitout.errors import ConfigError, Faults
from kitout.train.config import yaml_file
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*", re.ASCII)

# What stands where settings may stand: {where, with * for a number: the setting it is short for}.
SHORT = {
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

Value = tuple[str, Any]  # dotted name, plain value


def is_override(word: str) -> bool:
    """Whether a word of a command line is an override and not a file."""
    name, equals, _ = word.partition("=")
    return bool(equals) and (NAME.fullmatch(name) is not None or not word.endswith((".yaml", ".yml")))


def value_of(word: str) -> Value:
    """`train.lr=1e-4` -> ("train.lr", 0.0001). What YAML cannot read is taken as it stands (`path=*.jsonl`)."""
    name, _, words = word.partition("=")
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"{word!r}: a setting is written name=value, with a name such as train.lr")
    try:
        return name, yaml_file.parse(words, word)
    except ConfigError:
        if words.lstrip()[:1] in tuple("[{\"'"):
            raise
        return name, words


def config(file: Path | None, said: Iterable[Value | str]) -> RunConfig:
    """The run that a file (None: none) and overrides describe; the later wins. ConfigError tells every fault."""
    values = yaml_file.read(file) if file is not None else {}
    faults: list[str] = []
    for one in said:
        try:
            name, value = value_of(one) if isinstance(one, str) else one
            values = apply(values, name, value)
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
        found = Faults(ConfigError, "the run's config")
        for fault in faults:
            found.add(fault)
        found.raise_if_any()
    return made


def apply(values: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of plain values with one more."""
    fresh: dict[str, Any] = copy.deepcopy(dict(values))
    held: Any = fresh
    *above, last = name.split(".")
    for depth, part in enumerate(above):
        where = ".".join(above[: depth + 1])
        inner = _get(held, part, name)
        if not isinstance(inner, dict | list):
            inner = _written_out(inner, where, name)
        elif isinstance(inner, list) and not _next(above, depth, last).isdigit():
            inner = _single(inner, where, name)
        _set(held, part, inner, name)
        held = inner
    _set(held, last, value, name)
    return fresh


def _next(above: list[str], depth: int, last: str) -> str:
    return above[depth + 1] if depth + 1 < len(above) else last


def _written_out(short: Any, where: str, name: str) -> dict[str, Any]:
    if short is None:
        return {}
    key = SHORT.get(re.sub(r"\.\d+(?=\.|$)", ".*", where))
    if key is None:
        raise ConfigError(f"{name}: {where} is {short!r}, which holds no settings")
    return {key: short}


def _single(listed: list[Any], where: str, name: str) -> Any:
    """A setting of the one entry of a list: data.train.limit=100."""
    if len(listed) == 1 and isinstance(listed[0], str | dict):
        return listed[0] if isinstance(listed[0], dict) else _written_out(listed[0], f"{where}.0", name)
    raise ConfigError(f"{name}: {where} is a list of {len(listed)}; say which, for example {where}.0")


def _get(held: Any, part: str, name: str) -> Any:
    return held[_index(held, part, name)] if isinstance(held, list) else held.get(part)


def _set(held: Any, part: str, value: Any, name: str) -> None:
    if isinstance(held, list):
        held[_index(held, part, name)] = value
    else:
        held[part] = value


def _index(held: list[Any], part: str, name: str) -> int:
    if not part.isdigit() or int(part) >= len(held):
        there = f"0 to {len(held) - 1}" if held else "none"
        raise ConfigError(f"{name}: {part!r} is no number of an entry there is ({there})")
    return int(part)
