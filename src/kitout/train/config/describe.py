"""Every setting of a run in words, taken from the config's own model: for --help, for a run.yaml to begin with.

There is no second copy of a text: name, type, limits, default and meaning are the fields'. It knows no screen.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kitout.train.config import yaml_file
from kitout.train.config.schema import AugmentConfig, RunConfig
from kitout.train.config.type_text import type_text

WIDTH = 110

# What the example sets; every other setting is a comment with its default.
EXAMPLE_VALUES: dict[str, Any] = {
    "model.name": "smollm2-135m",
    "data.train": [{"path": "train.jsonl"}],
    "output.folder": "runs/first",
}
WRITTEN_LATER = ("method", "objective", "jobs")  # settings of no section that follow one


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


def sections(schema: type[BaseModel] = RunConfig) -> tuple[SectionDoc, ...]:
    """The sections of a config, in order; a section within a section after it."""
    fields = [
        (info.alias or name, info, *_section_model(info.annotation)) for name, info in schema.model_fields.items()
    ]
    alone = tuple(setting_doc(name, info) for name, info, inner, number in fields if inner is None or number)
    inside = (section_docs(name + number, inner) for name, _, inner, number in fields if inner is not None)
    return (SectionDoc("", doc_text(schema), alone), *(doc for docs in inside for doc in docs))


def section_docs(name: str, section: type[BaseModel]) -> Iterator[SectionDoc]:
    """A section with all its settings, then the sections in it."""
    fields = section.model_fields.items()
    yield SectionDoc(name, doc_text(section), tuple(setting_doc(field, info) for field, info in fields))
    for field, info in fields:
        inner, number = _section_model(info.annotation)
        if inner is not None:
            yield from section_docs(f"{name}.{info.alias or field}{number}", inner)


def setting_doc(name: str, info: FieldInfo) -> SettingDoc:
    """A field in words."""
    default = "" if info.is_required() else default_text(info.get_default(call_default_factory=True))
    return SettingDoc(
        info.alias or name,
        type_text(info.annotation, info.metadata),
        default,
        " ".join((info.description or "").split()),
    )


def _section_model(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section that a field holds, or holds several of, and how its name goes on: ".0" for one of several."""
    is_list = get_origin(annotation) is tuple
    inner = get_args(annotation)[0] if is_list else annotation
    is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
    return (inner, ".0" * is_list) if is_section else (None, "")


def doc_text(section: type[BaseModel]) -> str:
    """What a section is about, on one line."""
    return " ".join((inspect.getdoc(section) or "").split())


def default_text(value: Any) -> str:
    """A default as it would be written on one line of YAML."""
    methods = sys.modules.get("kitout.method")  # where it is not loaded, with torch, no value is a method
    if methods is not None and isinstance(value, methods.Method):
        return type(value).__name__
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return yaml_file.to_yaml({"v": value}).removeprefix("v: ").strip()
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def example_yaml(
    docs: tuple[SectionDoc, ...] = (),
    values: Mapping[str, Any] = EXAMPLE_VALUES,
    first_lines: Sequence[str] = ("# A run of kitout:  kitout train run.yaml",),
) -> str:
    """A run.yaml to begin with: what most runs set, and every other setting as a comment with its default.

    docs: of another config than a run's. values: what it sets, by dotted name.
    """
    lines = ["# Text follows '# '; a setting after '#' has its default: remove the '#' to change it."]
    lines = [first_lines[0], *lines, *first_lines[1:]]
    for section in docs or sections():
        if section.name == "":
            top_level = section.settings
            for setting in (one for one in top_level if one.name not in WRITTEN_LATER):
                lines += ["", *_setting_lines(setting, "", values.get(setting.name))]
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
            lines += ["", *_comment_lines(section.text, ""), f"{section.name}:", *_section_lines(section, values)]
            if section.name == "model":
                lines += _method_lines(next(s for s in top_level if s.name == "method"))
        if section.name == "data.train.0":
            at = lines.index(f"    - path: {values['data.train'][0]['path']}")
            lines[at + 1 : at + 1] = list(_comment_out(source.settings[1:], "      "))
            objective = (one for one in top_level if one.name == "objective")
            lines += [line for one in objective for line in ("", *_setting_lines(one, "", None))]
    return "\n".join(lines) + "\n"


def _method_lines(method: SettingDoc) -> Iterator[str]:
    from kitout.methods import LoRA

    yield ""
    yield from _comment_lines(method.text, "")
    yield from ("method:", f"  name: {method.default}", "  rank: 8")
    defaults = LoRA()
    yield from (f"  #{name}: {default_text(getattr(defaults, name))}" for name in LoRA.model_fields if name != "rank")


def _section_lines(section: SectionDoc, values: Mapping[str, Any]) -> Iterator[str]:
    for setting in section.settings:
        yield from _setting_lines(setting, "  ", values.get(f"{section.name}.{setting.name}"))


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
