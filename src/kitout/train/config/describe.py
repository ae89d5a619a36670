"""Every setting of a run in words, taken from the config's own model: for --help, for a run.yaml to begin with.

There is no second copy of a text: name, type, limits, default and meaning are the fields'. It knows no screen.
"""

from __future__ import annotations

import inspect
import json
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kitout.method import Method
from kitout.train.config import yaml_file
from kitout.train.config.schema import AugmentConfig, JobConfig, RunConfig, SourceConfig

WIDTH = 110
TYPES: dict[Any, str] = {
    str: "text", bool: "true | false", int: "whole number", float: "number", Path: "folder", Method: "method",
    SourceConfig: "source", JobConfig: "job", AugmentConfig: "augmentation", Any: "value",
}  # fmt: skip
AUGMENT = "augmentation"
SIGNS = ((Gt, ">", "gt"), (Ge, ">=", "ge"), (Lt, "<", "lt"), (Le, "<=", "le"))

# What the example says; all else stands there as a comment with its default.
EXAMPLE: dict[str, Any] = {
    "model.name": "smollm2-135m",
    "data.train": [{"path": "train.jsonl"}],
    "train.epochs": 1.0,
    "train.batch": 16,
    "output.folder": "runs/first",
}


@dataclass(frozen=True)
class Setting:
    """kind: the type in words, with its limits. default: as YAML has it; "" if it must be said."""

    name: str
    kind: str
    default: str
    text: str


@dataclass(frozen=True)
class Section:
    """name: "" for what belongs to none."""

    name: str
    text: str
    settings: tuple[Setting, ...]


def sections() -> tuple[Section, ...]:
    """The run's, in order; a section within a section after it."""
    found: list[Section] = []
    loose: list[Setting] = []
    for name, info in RunConfig.model_fields.items():
        inner = _section(info.annotation)
        if inner is None or inner is JobConfig:
            loose.append(_setting(name, info))
        if inner is not None:
            repeated = ".0" if inner is JobConfig else ""
            found.append(Section(name + repeated, _text(inner), tuple(_settings(inner))))
        if name == "data":
            found.append(Section("data.train.0", _text(SourceConfig), tuple(_settings(SourceConfig))))
            found.append(Section("data.augment", _text(AugmentConfig), tuple(_settings(AugmentConfig))))
    return (Section("", _text(RunConfig), tuple(loose)), *found)


def _settings(section: type[BaseModel]) -> Iterator[Setting]:
    return (_setting(name, info) for name, info in section.model_fields.items())


def _setting(name: str, info: FieldInfo) -> Setting:
    default = "" if info.is_required() else flow(info.get_default(call_default_factory=True))
    return Setting(name, type_text(info.annotation, info.metadata), default, " ".join((info.description or "").split()))


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, or holds several of."""
    inner = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not Method else None


def _text(section: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(section) or "").split())


def type_text(annotation: Any, limits: Any = ()) -> str:
    """A type in words, with the limits that pydantic holds beside it: `whole number >= 1`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(inner[0], limits)
    if origin is Literal:
        text = " | ".join(map(str, inner))
    elif origin in (Union, types.UnionType):
        shown = [one for one in inner if one is not type(None) and not (one is int and float in inner)]
        text = " | ".join(dict.fromkeys(map(type_text, shown)))
    elif origin is tuple:
        text = f"list of {type_text(inner[0])}"
    elif origin is dict:
        text = f"settings (name: {type_text(inner[1])})"
    else:
        text = TYPES.get(annotation, "settings")
    bounds = [f"{sign} {getattr(one, name):g}" for one in limits for cls, sign, name in SIGNS if isinstance(one, cls)]
    return f"{text} {', '.join(bounds)}" if bounds else text


def flow(value: Any) -> str:
    """A default as it would be written on one line of YAML."""
    if isinstance(value, Method):
        return type(value).__name__
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return yaml_file.written({"v": value}).removeprefix("v: ").strip()
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def example() -> str:
    """A run.yaml to begin with: what most runs say, and every other setting as a comment with its default."""
    lines = [
        "# A run of kitout:  kitout train run.yaml",
        "# Words stand behind '# '; a setting behind '#' has its default: take the sign off to change it.",
    ]
    for section in sections():
        if section.name == "":
            loose = section.settings
        elif section.name == "data.train.0":
            source = section  # written within data
        elif section.name == "data.augment":  # written within data, as it is the last that is
            at = lines.index("  augment:") + 1
            lines[at:at] = list(_commented(section.settings, "    "))
        elif section.name == "jobs.0":
            lines += ["", *_words(next(s.text for s in loose if s.name == "jobs"), ""), "#jobs:", "#  - name: first"]
        else:
            lines += ["", *_words(section.text, ""), f"{section.name}:", *_section_lines(section)]
            if section.name == "model":
                lines += _method_lines(next(s for s in loose if s.name == "method"))
        if section.name == "data.train.0":
            at = next(i for i, line in enumerate(lines) if line == "    - path: train.jsonl")
            lines[at + 1 : at + 1] = list(_commented(source.settings[1:], "      "))
            lines += ["", *_one(next(s for s in loose if s.name == "objective"), "", None)]
    return "\n".join(lines) + "\n"


def _method_lines(method: Setting) -> Iterator[str]:
    from kitout.methods import LoRA

    yield ""
    yield from _words(method.text, "")
    yield from ("method:", f"  name: {method.default}", "  rank: 8")
    made = LoRA()
    yield from (f"  #{name}: {flow(getattr(made, name))}" for name in LoRA.model_fields if name != "rank")


def _section_lines(section: Section) -> Iterator[str]:
    for setting in section.settings:
        yield from _one(setting, "  ", EXAMPLE.get(f"{section.name}.{setting.name}"))


def _commented(settings: tuple[Setting, ...], indent: str) -> Iterator[str]:
    for setting in settings:
        yield from _one(setting, indent, None)


def _one(setting: Setting, indent: str, said: Any) -> Iterator[str]:
    told = "|" in setting.kind and setting.kind != type_text(bool)  # the default shows the type of the others
    yield from _words(f"{setting.text} ({setting.kind})" if told else setting.text, indent)
    if isinstance(said, list):
        yield f"{indent}{setting.name}:"
        yield from (f"{indent}  - {name}: {value}" for one in said for name, value in one.items())
    elif said is not None:
        yield f"{indent}{setting.name}: {said}"
    elif setting.kind == AUGMENT:
        yield f"{indent}{setting.name}:"
    else:
        yield f"{indent}#{setting.name}: {setting.default}"


def _words(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
