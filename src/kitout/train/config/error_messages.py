"""pydantic's errors in words that help: the setting's dotted name, the value, what to write instead.

A value that fits none of several types is one error, not one for each; a setting that is not known names the closest
one, or what it is called now. It knows no config but by its model's fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kitout.errors import suggest
from kitout.format import short_repr
from kitout.train.config.foreign_keys import key_hint
from kitout.train.config.renamed_keys import RENAMED_OBJECTIVES, new_key
from kitout.train.config.sections import ConfigSection

MAX_MESSAGE_CHARS, MAX_NAME_CHARS, MAX_PLACES = 600, 80, 3
JOIN = "\n  - "  # between the errors of one validator

EXPECTED = {  # by the beginning of pydantic's name for the error
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


AdviceAt = Callable[[str], Mapping[str, str]]  # of a location: what else keys there are called -> what to say of it


def explain(
    validation_error: ValidationError, model: type[BaseModel], advice_at: AdviceAt | None = None
) -> list[str]:  # fmt: skip
    """Every error once, in the order of the settings. advice_at: in place of the model's `foreign_keys`."""
    by_location: dict[str, list[Any]] = {}
    sections: dict[str, type[BaseModel]] = {}
    for error in validation_error.errors(include_url=False):
        location, section = _named_location(error["loc"], model)
        by_location.setdefault(location, []).append(error)
        sections[location] = section
    messages = (
        message
        for location, errors in by_location.items()
        for message in _messages_at(location, errors, sections[location], model, advice_at)
    )
    return [message[:MAX_MESSAGE_CHARS] for message in messages]


def _messages_at(
    location: str, errors: Sequence[Any], section: type[BaseModel], model: type[BaseModel], advice_at: AdviceAt | None
) -> Iterator[str]:
    """The messages of one setting. Errors of a type are one message: the value may be of any of several types."""
    type_errors = []
    for error in errors:
        if error["type"] == "missing":
            yield f"{location}: is required"
        elif error["type"] == "extra_forbidden":
            renamed = new_key(location)
            known = [f.alias or n for n, f in section.model_fields.items()]
            hint = hint_for_key(location, model, advice_at) or suggest(location.rpartition(".")[2], known)
            yield f"{location}: is now {renamed}" if renamed else f"{location}: there is no such setting; {hint}"
        elif error["type"] == "value_error":
            yield from _validator_errors(location, error["msg"].removeprefix("Value error, "))
        else:
            type_errors.append(error)
    if not type_errors:
        return
    value = type_errors[0]["input"]
    if location == "objective" and value in tuple(RENAMED_OBJECTIVES):
        yield f"{location}: {value!r} is now {RENAMED_OBJECTIVES[value]!r}"
    else:
        expected = " or ".join(dict.fromkeys(map(_expected, type_errors)))
        yield f"{location}: expected {expected}, found {short_repr(value)}"


def hint_for_key(location: str, model: type[BaseModel], advice_at: AdviceAt | None = None) -> str | None:
    """What to write instead of a key that is another library's, or another section's; None for any other key."""
    if advice_at is not None:
        own = advice_at(location)
    else:
        own = model.foreign_keys if issubclass(model, ConfigSection) else {}
    advice = key_hint(location, own) or _same_key_elsewhere(location, model)
    return advice and _in_an_entry(advice, model)


def _same_key_elsewhere(location: str, model: type[BaseModel]) -> str | None:
    """A key of another section, written in the wrong one: `train.max_length` -> "write data.max_length"."""
    key = location.rpartition(".")[2]
    found = [f"{name}.{key}" for name, section in sections_of(model) if key in keys_of(section)]
    group, number, *_ = [*location.split("."), "", ""]
    for name, entry in sections_of(model, of_entries=True):
        if name == group and number.isdigit():  # within one entry of a list of sections
            found += [f"{group}.{number}.{inner}.{key}" for inner, one in sections_of(entry) if key in keys_of(one)]
            found += [f"{group}.{number}.{key}"] if key in keys_of(entry) else []
    if not found and "." not in location:
        found = [key for _, entry in sections_of(model, of_entries=True) if key in keys_of(entry)]
    return f"write {' or '.join(dict.fromkeys(found))}" if 1 <= len(found) <= MAX_PLACES else None


def _in_an_entry(advice: str, model: type[BaseModel]) -> str:
    """Advice about a setting that only the entries of a list have: "write train.lr" -> "write stages.0.train.lr"."""
    first = advice.removeprefix("write ").split(".")[0].split(" ")[0].split("=")[0]
    if not advice.startswith("write ") or first in keys_of(model):
        return advice
    groups = [name for name, entry in sections_of(model, of_entries=True) if first in keys_of(entry)]
    return advice.replace("write ", f"write {groups[0]}.0.", 1) if groups else advice


def sections_of(model: type[BaseModel], of_entries: bool = False) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections that a config holds by the names of their fields; of_entries: those that it holds lists of."""
    for name, field in model.model_fields.items():
        if (get_origin(field.annotation) is tuple) == of_entries:
            classes = (cls for cls in _classes_in(field.annotation) if issubclass(cls, BaseModel))
            yield from ((field.alias or name, cls) for cls in classes)


def keys_of(section: type[BaseModel]) -> set[str]:
    """Its settings as they are written."""
    return {field.alias or name for name, field in section.model_fields.items()}


def _validator_errors(location: str, message: str) -> Iterator[str]:
    """Errors that a validator of ours reports: of the location's own settings, or of the location itself."""
    for part in message.split(JOIN):
        first_word = part.split(":", 1)[0]
        is_setting = ":" in part and first_word.replace(".", "_").isidentifier()
        yield f"{location}.{part}" if location and is_setting else f"{location}: {part}" if location else part


def _expected(error: Any) -> str:
    for prefix, text in EXPECTED.items():
        if error["type"].startswith(prefix):
            return text.format(**error.get("ctx", {}))
    return str(error["msg"])


def _named_location(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """The dotted name without pydantic's marks for the members of a union, and the section it belongs to."""
    names: list[str] = []
    section: type[BaseModel] | None = model
    innermost, annotation = model, None
    for part in location:
        if isinstance(part, int):
            names.append(str(part))
        elif section is not None:
            names.append(part[:MAX_NAME_CHARS])
            innermost = section
            field = section.model_fields.get(part)
            annotation = None if field is None else field.annotation
            section = next((cls for cls in _classes_in(annotation) if issubclass(cls, BaseModel)), None)
        elif get_origin(annotation) is dict:
            names.append(part[:MAX_NAME_CHARS])
    return ".".join(names), innermost


def _classes_in(annotation: Any) -> Iterator[type]:
    """Every class an annotation names."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for inner in get_args(annotation):
        yield from _classes_in(inner)
