"""YAML as people mean it: version 1.2's plain values, no key twice, nothing run.

1e-4 is a number, `no` is a word and 2024-01-01 is not a date, unlike in YAML 1.1, which PyYAML reads by default. What
is written here is read back as it was. It knows no config.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kitout.errors import ConfigError

MERGE = "tag:yaml.org,2002:merge"
KINDS: list[tuple[str, str, str]] = [  # tag, pattern, first letters
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    (MERGE, r"<<", "<"),  # of 1.1 and still in use: {<<: *other}
    ("tag:yaml.org,2002:float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
]


class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, Any] = {}
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is said twice, first in line {seen[name] + 1}", key.start_mark
                )
            if isinstance(name, Hashable):
                seen[name] = key.start_mark.line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        words = str(self.construct_scalar(node))
        return int(words, 0) if re.match("0[ox]", words) else int(words)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


class Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what either version of YAML would take for something else than a string."""

    yaml_implicit_resolvers = {first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in KINDS:
    for _where in (Loader, Dumper):
        _where.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), [c.strip("\0") for c in _first])


def parse(text: str, name: str) -> Any:
    """The value a text holds. name: what it is called in an error, which tells line and column."""
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as wrong:
        mark = wrong.problem_mark or wrong.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        shown = (text.split("\n")[mark.line : mark.line + 1] or [""])[0].strip() if mark else ""
        said = ": ".join(filter(None, (wrong.context, wrong.problem)))
        raise ConfigError(f"{name}{place}: {said}" + (f"\n    {shown[:100]}" if shown else "")) from wrong
    except yaml.YAMLError as wrong:  # bytes that YAML has no use for
        raise ConfigError(f"{name}: not YAML ({' '.join(str(wrong).split())})") from wrong
    except (RecursionError, ValueError) as wrong:
        raise ConfigError(f"{name}: not YAML that can be read ({str(wrong)[:200]})") from wrong


def read(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        what = "is a folder, not a file" if file.is_dir() else "is not there"
        raise ConfigError(f"{file} {what}" + (f"; beside it: {', '.join(near[:8])}" if near else ""))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise ConfigError(f"{file} is not UTF-8 (byte {wrong.start}): is it a YAML file?") from wrong
    except OSError as wrong:
        raise ConfigError(f"{file} cannot be read: {wrong.strerror}") from wrong
    values = parse(text, str(file))
    if values is None:
        raise ConfigError(f"{file} is empty; `kitout train --example` writes one to begin with")
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold sections (model:, data:, ...), found a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def written(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    text: str = yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text
