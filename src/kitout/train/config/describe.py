"""Every setting of a run in words, taken from the config's own model: for --help, for a run.yaml to begin with.

There is no second copy of a text: name, type, limits, default and meaning are the fields'. It knows no screen.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kitout.train.config import yaml_file
from kitout.train.config.schema import AugmentConfig, JobConfig, RunConfig, SourceConfig
from kitout.train.config.type_text import type_text

WIDTH = 110

# What the example sets; every other setting is a comment with its default.
EXAMPLE_VALUES: dict[str, Any] = {
    "model.name": "smollm2-135m",
    "data.train": [{"path": "train.jsonl"}],
    "output.folder": "runs/first",
}


@dataclass(frozen=True)
class SettingDoc:
    """One setting in words."""

    name: str
    """Without its section."""
    kind: str
    """The type in words, with its limits."""
    default: str
    """As YAML has it; "" if the setting is required."""
    text: str
    """What it does."""


@dataclass(frozen=True)
class SectionDoc:
    """One section of the config in words."""

    name: str
    """Dotted; "" for the settings that belong to no section."""
    text: str
    """What it is about."""
    settings: tuple[SettingDoc, ...]
    """In order."""


def sections() -> tuple[SectionDoc, ...]:
    """The sections of a run, in order; a section within a section after it."""
    docs: list[SectionDoc] = []
    top_level: list[SettingDoc] = []
    for name, info in RunConfig.model_fields.items():
        inner = _section_model(info.annotation)
        if inner is None or inner is JobConfig:
            top_level.append(_setting_doc(name, info))
        if inner is not None:
            repeated = ".0" if inner is JobConfig else ""
            docs.append(SectionDoc(name + repeated, _doc_text(inner), tuple(_setting_docs(inner))))
        if name == "data":
            docs.append(SectionDoc("data.train.0", _doc_text(SourceConfig), tuple(_setting_docs(SourceConfig))))
            docs.append(SectionDoc("data.augment", _doc_text(AugmentConfig), tuple(_setting_docs(AugmentConfig))))
    return (SectionDoc("", _doc_text(RunConfig), tuple(top_level)), *docs)


def _setting_docs(section: type[BaseModel]) -> Iterator[SettingDoc]:
    return (_setting_doc(name, info) for name, info in section.model_fields.items())


def _setting_doc(name: str, info: FieldInfo) -> SettingDoc:
    default = "" if info.is_required() else default_text(info.get_default(call_default_factory=True))
    return SettingDoc(
        info.alias or name,
        type_text(info.annotation, info.metadata),
        default,
        " ".join((info.description or "").split()),
    )


def _section_model(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or holds several of."""
    inner = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _doc_text(section: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(section) or "").split())


def default_text(value: Any) -> str:
    """A default as it would be written on one line of YAML."""
    from kitout.method import Method

    if isinstance(value, Method):
        return type(value).__name__
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return yaml_file.to_yaml({"v": value}).removeprefix("v: ").strip()
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def example_yaml() -> str:
    """A run.yaml to begin with: what most runs set, and every other setting as a comment with its default."""
    lines = [
        "# A run of kitout:  kitout train run.yaml",
        "# Text follows '# '; a setting after '#' has its default: remove the '#' to change it.",
    ]
    for section in sections():
        if section.name == "":
            top_level = section.settings
        elif section.name == "data.train.0":
            source = section  # written within data
        elif section.name == "data.augment":  # written within data, as it is the last that is
            at = lines.index("  augment:") + 1
            lines[at:at] = list(_comment_out(section.settings, "    "))
        elif section.name == "jobs.0":
            lines += [
                "",
                *_comment_lines(next(s.text for s in top_level if s.name == "jobs"), ""),
                "#jobs:",
                "#  - name: first",
            ]
        else:
            lines += ["", *_comment_lines(section.text, ""), f"{section.name}:", *_section_lines(section)]
            if section.name == "model":
                lines += _method_lines(next(s for s in top_level if s.name == "method"))
        if section.name == "data.train.0":
            at = next(i for i, line in enumerate(lines) if line == "    - path: train.jsonl")
            lines[at + 1 : at + 1] = list(_comment_out(source.settings[1:], "      "))
            lines += ["", *_setting_lines(next(s for s in top_level if s.name == "objective"), "", None)]
    return "\n".join(lines) + "\n"


def _method_lines(method: SettingDoc) -> Iterator[str]:
    from kitout.methods import LoRA

    yield ""
    yield from _comment_lines(method.text, "")
    yield from ("method:", f"  name: {method.default}", "  rank: 8")
    defaults = LoRA()
    yield from (f"  #{name}: {default_text(getattr(defaults, name))}" for name in LoRA.model_fields if name != "rank")


def _section_lines(section: SectionDoc) -> Iterator[str]:
    for setting in section.settings:
        yield from _setting_lines(setting, "  ", EXAMPLE_VALUES.get(f"{section.name}.{setting.name}"))


def _comment_out(settings: tuple[SettingDoc, ...], indent: str) -> Iterator[str]:
    for setting in settings:
        yield from _setting_lines(setting, indent, None)


def _setting_lines(setting: SettingDoc, indent: str, given: Any) -> Iterator[str]:
    is_choice = "|" in setting.kind and setting.kind != type_text(bool)  # the default shows the type of the others
    yield from _comment_lines(f"{setting.text} ({setting.kind})" if is_choice else setting.text, indent)
    if isinstance(given, list):
        yield f"{indent}{setting.name}:"
        yield from (f"{indent}  - {name}: {value}" for one in given for name, value in one.items())
    elif given is not None:
        yield f"{indent}{setting.name}: {given}"
    elif setting.kind == AugmentConfig.type_name:
        yield f"{indent}{setting.name}:"
    else:
        yield f"{indent}#{setting.name}: {setting.default}"


def _comment_lines(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
