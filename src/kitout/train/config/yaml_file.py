"""YAML 1.2 with plain values: no key twice, nothing run.

ruamel.yaml reads it: 1e-4 is a number, and `no`, `on` and 1:30 are strings, unlike in YAML 1.1, which PyYAML reads.
Dates stay strings too. What is written here is read back as it was. It knows no config.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from kitout.errors import ConfigError
from kitout.files.system_errors import as_path
from kitout.format import short_repr
from kitout.train.config.plain_values import check_size

MAX_CHARS = 150_000  # of a text; the parser takes seconds for so many, and minutes for a megabyte
MAX_OPEN_BRACKETS = 200  # the parser looks far ahead for each


BRACKET_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
BRACKETS_PATTERN = re.compile(r"[\[\]{}]")


class _YamlConstructor(SafeConstructor):
    """Dates, `=` and 1_000 stay strings, as in YAML 1.2: a model or a folder may be named so, no setting is one."""

    def construct_yaml_int(self, node: Any) -> Any:
        return node.value if "_" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        return node.value if "_" in node.value else super().construct_yaml_float(node)


class _YamlRepresenter(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _construct in {
    "timestamp": SafeConstructor.construct_yaml_str,
    "value": SafeConstructor.construct_yaml_str,
    "int": _YamlConstructor.construct_yaml_int,
    "float": _YamlConstructor.construct_yaml_float,
}.items():
    _YamlConstructor.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct)


def _yaml_parser() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Representer = _YamlConstructor, _YamlRepresenter
    yaml.default_flow_style, yaml.width = False, 110
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    return yaml


def parse_yaml(text: str, name: str) -> Any:
    """The value of a text. name: of the text in an error, which gives line and column."""
    if len(text) > MAX_CHARS:
        raise ConfigError(f"{name}: {len(text):,} characters, at most {MAX_CHARS:,} can be settings")
    try:
        if max(accumulate(BRACKET_STEPS[c] for c in BRACKETS_PATTERN.findall(text)), default=0) > MAX_OPEN_BRACKETS:
            raise ConfigError(f"{name}: more than {MAX_OPEN_BRACKETS} open brackets in each other")
        if "*" in text:  # aliases: `<<: *name` copies as it is read, so they are counted before
            check_size(_yaml_parser().compose(text), name, _parts_of_node)
        return _yaml_parser().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        line = (text.split("\n")[mark.line : mark.line + 1] or [""])[0].strip() if mark else ""
        message = ": ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{name}{location}: {message}" + (f"\n    {line[:100]}" if line else "")) from error
    except YAMLError as error:  # bytes that YAML does not allow
        raise ConfigError(f"{name}: not YAML ({' '.join(str(error).split())})") from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{name}: not YAML that can be read ({str(error)[:200]})") from error


def _parts_of_node(node: Any) -> list[Any]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    file = as_path(file)
    try:
        is_file = file.is_file()
    except OSError as error:  # a name that is too long
        raise ConfigError(f"{short_repr(str(file))} cannot be read: {error.strerror}") from error
    if not is_file:
        others = sorted(p.name for p in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        problem = "is a folder, not a file" if file.is_dir() else "is not there"
        raise ConfigError(f"{file} {problem}" + (f"; beside it: {', '.join(others[:8])}" if others else ""))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 (byte {error.start}): is it a YAML file?") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    values = parse_yaml(text, str(file))
    if values is None:
        raise ConfigError(f"{file} is empty; `kitout train --example` writes one to begin with")
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold sections (model:, data:, ...), found a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    text = io.StringIO()
    _yaml_parser().dump(dict(values), text)
    return text.getvalue()
