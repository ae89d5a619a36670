"""A Method as a config has it: by its name, or its name with settings; and the schema that a form shows for it.

It knows every registered method by its class alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema

from kitout import methods as _registering  # noqa: F401 - a run may name any method there is
from kitout.errors import ConfigError, suggest
from kitout.format import short_repr
from kitout.method import REGISTRY, Method
from kitout.train.config.error_messages import JOIN, explain


def parse_method(value: Any) -> Method:
    """A Method from itself, its name, or its name with settings."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, str | Mapping):
        raise ValueError(f'write a method\'s name, or {{"name": "LoRA", "rank": 16}}; found {short_repr(value)}')
    settings = {"name": value} if isinstance(value, str) else {str(key): v for key, v in value.items()}
    name = settings.pop("name", "LoRA")
    if not isinstance(name, str):
        raise ValueError(f"name: expected the name of a method, found {short_repr(name)}")
    if name not in REGISTRY:
        same = [known for known in REGISTRY if known.lower() == name.lower()]
        raise ValueError(f"there is no method {short_repr(name)}: {suggest(same[0] if same else name, REGISTRY)}")
    known = REGISTRY[name].model_fields
    errors = [f"{key}: {name} has no such setting; {suggest(key, known)}" for key in settings if key not in known]
    try:
        method = REGISTRY[name](**{key: v for key, v in settings.items() if key in known})
    except ConfigError as error:
        cause = error.__context__
        errors += explain(cause, REGISTRY[name]) if isinstance(cause, ValidationError) else [str(error)]
    if errors:
        raise ValueError(JOIN.join(errors))
    return method


def method_to_dict(method: Method) -> dict[str, Any]:
    """A Method as its name and what differs from its defaults."""
    return {"name": type(method).__name__, **method.model_dump(mode="json", exclude_defaults=True)}


class _MethodSchema:
    """Of any method: one object for each, discriminated by its name."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "title": "Method",
            "oneOf": [_schema_of(name, cls) for name, cls in REGISTRY.items()],
            "discriminator": {"propertyName": "name"},
        }


def _schema_of(name: str, cls: type[Method]) -> dict[str, Any]:
    schema = cls.model_json_schema()
    return {
        "title": name,
        "description": " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()),
        "type": "object",
        "properties": {"name": {"const": name, "title": "Name"}, **schema["properties"]},
        "required": ["name"],
        "additionalProperties": False,
        **({"$defs": schema["$defs"]} if "$defs" in schema else {}),
    }


MethodField: TypeAlias = Annotated[Method, _MethodSchema()]
