"""A Method as a config has it: by its name, or its name with settings; and the schema that a form shows for it.

Names are read without case, hyphens and underscores, and a variant (`vpt-deep`) is a method with a setting. It loads
the methods, and torch with them, when it has one to build: until then a field is of no class, and `names_a_method`
knows the methods by their files.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from kitout.errors import ConfigError, suggest
from kitout.format import short_repr
from kitout.train.config.error_messages import JOIN, explain
from kitout.train.config.foreign_keys import method_hint

if TYPE_CHECKING:
    from kitout.method import Method

METHODS_FOLDER = Path(__file__).parents[2] / "methods"  # one file per method, named as its class
DEFAULT_METHOD = "LoRA"
# What papers and other libraries call a method with a setting, and the names of `kitout demo vision`.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vpt-deep": ("VPT", {"deep": True}),
    "vpt-shallow": ("VPT", {"deep": False}),
    "dora": ("LoRA", {"dora": True}),
    "rslora": ("LoRA", {"rslora": True}),
    "pissa": ("LoRA", {"init": "pissa"}),
    "linear": ("PartialFineTuning", {"part": "head"}),
    "full": ("FullFineTuning", {}),
}
# Methods elsewhere that are no method here.
ELSEWHERE = {
    "qlora": "write method=LoRA and model.quantization=nf4",
    "lora+": "write method=LoRA and train.loraplus_lr_ratio=16",
    "loraplus": "write method=LoRA and train.loraplus_lr_ratio=16",
    "adapter": "write method=Houlsby or method=Pfeiffer",
    "bottleneck": "write method=Houlsby or method=Pfeiffer",
    "freeze": "write method.name=PartialFineTuning method.last=2",
    "p-tuning": "write method=PromptTuning, or method=PrefixTuning for keys and values at every block",
}
CLOSE_ENOUGH = 0.75


def fold_name(name: str) -> str:
    """`Prefix-Tuning`, `prefix_tuning` -> prefixtuning."""
    return re.sub(r"[-_ ]", "", name).lower()


def names_a_method(name: str) -> bool:
    """Whether it is the name of a method or variant of kitout's own. Loads none of them."""
    return fold_name(name) in _own_names()


@cache
def _own_names() -> frozenset[str]:
    files = (fold_name(file.stem) for file in METHODS_FOLDER.rglob("*.py") if not file.stem.startswith("_"))
    return frozenset([*files, *map(fold_name, VARIANTS)])


def find_method(name: str) -> tuple[type[Method], dict[str, Any]]:
    """The class that a name means, and the settings that the name implies. ConfigError for an unknown name."""
    from kitout import methods as _registering  # noqa: F401 - a run may name any method there is
    from kitout.method import REGISTRY

    folded = fold_name(name)
    known = {fold_name(one): one for one in REGISTRY}
    variants = {fold_name(one): one for one in VARIANTS}
    if name in REGISTRY or folded in known:
        return REGISTRY[name if name in REGISTRY else known[folded]], {}
    if folded in variants:
        class_name, settings = VARIANTS[variants[folded]]
        return REGISTRY[class_name], settings
    elsewhere = {fold_name(one): text for one, text in ELSEWHERE.items()}
    names = known | variants
    close = [one for one in names if folded and folded in one][:3] or get_close_matches(
        folded[:80], names, n=3, cutoff=CLOSE_ENOUGH
    )
    if folded in elsewhere:
        hint = elsewhere[folded]
    elif close:
        hint = f"did you mean {' or '.join(repr(names[one]) for one in close)}?"
    else:
        hint = f"known: {', '.join(REGISTRY)}"
    raise ConfigError(f"there is no method {short_repr(name)}: {hint}")


def parse_method(value: Any) -> Method:
    """A Method from itself, its name, or its name with settings."""
    from kitout.method import Method

    if isinstance(value, Method):
        return value
    if not isinstance(value, str | Mapping):
        raise ValueError(f'write a method\'s name, or {{"name": "LoRA", "rank": 16}}; found {short_repr(value)}')
    settings = {"name": value} if isinstance(value, str) else {str(key): v for key, v in value.items()}
    given = settings.pop("name", DEFAULT_METHOD)
    if not isinstance(given, str):
        raise ValueError(f"name: expected the name of a method, found {short_repr(given)}")
    cls, implied = find_method(given)
    name, known = cls.__name__, cls.model_fields
    errors = [f"{key}: {name} has no such setting; {_setting_hint(key, cls)}" for key in settings if key not in known]
    errors += [
        f"{key}: {given} is {name} with {key}={short_repr(v)}: leave it out, or write method.name={name}"
        for key, v in implied.items()
        if settings.get(key, v) != v
    ]
    try:
        method = cls(**implied | {key: v for key, v in settings.items() if key in known})
    except ConfigError as error:
        cause = error.__context__
        errors += explain(cause, cls) if isinstance(cause, ValidationError) else [str(error)]
    if errors:
        raise ValueError(JOIN.join(errors))
    return method


def _setting_hint(key: str, cls: type[Method]) -> str:
    return method_hint(key, cls.model_fields) or suggest(key, cls.model_fields)


def method_to_dict(method: Method) -> dict[str, Any]:
    """A Method as its name and what differs from its defaults."""
    return {"name": type(method).__name__, **method.model_dump(mode="json", exclude_defaults=True)}


class AnyMethod:
    """The type of a field that holds a Method: `parse_method` checks it, because the class itself would load torch."""

    type_name = "method"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.any_schema()

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Of any method: one object for each, discriminated by its name."""
        from kitout import methods as _registering  # noqa: F401
        from kitout.method import REGISTRY

        return {
            "title": "Method",
            "oneOf": [_schema_of(name, method) for name, method in REGISTRY.items()],
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


if TYPE_CHECKING:
    MethodField = Method
else:
    MethodField = AnyMethod
