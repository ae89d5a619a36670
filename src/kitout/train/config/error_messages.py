"""What pydantic finds wrong with a config, in words that help: the setting's dotted name, the value found, the fix.

A value that fits none of several types is one fault, not one for each; an unknown setting names the closest known one.
It knows no config but by its model's fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kitout.errors import suggest

MAX_MESSAGE_CHARS = 600
JOIN = "\n  - "  # between the faults of one validator

EXPECTED = {  # by the beginning of pydantic's name for the fault
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "a text",
    "tuple_": "a list",
    "list_": "a list",
    "dict_": "settings (name: value)",
    "model_": "settings (name: value)",
    "path_": "a path",
    "finite_number": "a number that is finite",
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "{le:g} or less",
    "less_than": "less than {lt:g}",
    "literal_error": "{expected}",
}


def explain(validation_error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Every fault once, in order."""
    lines: list[str] = []
    expected: dict[str, tuple[list[str], str]] = {}  # of several types, by place
    for error in validation_error.errors(include_url=False):
        place, section = _named_location(error["loc"], model)
        if error["type"] == "missing":
            lines.append(f"{place}: must be said")
        elif error["type"] == "extra_forbidden":
            lines.append(
                f"{place}: there is no such setting; {suggest(place.rpartition('.')[2], section.model_fields)}"
            )
        elif error["type"] == "value_error":
            lines += _validator_errors(place, error["msg"].removeprefix("Value error, "))
        else:
            if place not in expected:
                lines.append(place)  # its words come when all its types are known
            expected.setdefault(place, ([], repr(error["input"])))[0].append(_expected(error))
    return [
        _expectation_line(line, *expected[line]) if line in expected else line[:MAX_MESSAGE_CHARS] for line in lines
    ]


def _validator_errors(location: str, message: str) -> Iterator[str]:
    """Faults that a validator of ours has found: in the place's own settings, or in the place itself."""
    for part in message.split(JOIN):
        inner = part.split(":", 1)[0]
        deeper = ":" in part and inner.replace(".", "_").isidentifier()
        yield f"{location}.{part}" if location and deeper else f"{location}: {part}" if location else part


def _expected(error: Any) -> str:
    for beginning, words in EXPECTED.items():
        if error["type"].startswith(beginning):
            return words.format(**error.get("ctx", {}))
    return str(error["msg"])


def _expectation_line(location: str, expected: list[str], given: str) -> str:
    return f"{location}: expected {' or '.join(dict.fromkeys(expected))}, found {given}"[:MAX_MESSAGE_CHARS]


def _named_location(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """The dotted name without pydantic's marks for the members of a union, and the section it lies in."""
    names: list[str] = []
    section: type[BaseModel] | None = model
    inside, annotation = model, None
    for part in location:
        if isinstance(part, int):
            names.append(str(part))
        elif section is not None:
            names.append(part)
            inside = section
            field = section.model_fields.get(part)
            annotation = None if field is None else field.annotation
            section = _model_in(annotation)
        elif get_origin(annotation) is dict:
            names.append(part)
    return ".".join(names), inside


def _model_in(annotation: Any) -> type[BaseModel] | None:
    return next((kind for kind in _classes_in(annotation) if issubclass(kind, BaseModel)), None)


def _classes_in(annotation: Any) -> Iterator[type]:
    """Every class an annotation names."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for inner in get_args(annotation):
        yield from _classes_in(inner)
