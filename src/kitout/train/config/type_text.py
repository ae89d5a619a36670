"""The type of a setting in words, with its limits: for --help, for the page of a method and for a run.yaml.

A section of the config says itself what it is called (`type_name`). It knows no setting.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

TYPES: dict[Any, str] = {
    str: "text", bool: "true | false", int: "whole number", float: "number", Path: "folder", Any: "value",
}  # fmt: skip
SIGNS = ((Gt, ">", "gt"), (Ge, ">=", "ge"), (Lt, "<", "lt"), (Le, "<=", "le"))


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
        text = TYPES.get(annotation) or str(getattr(annotation, "type_name", "settings"))
    bounds = [f"{sign} {getattr(one, name):g}" for one in limits for cls, sign, name in SIGNS if isinstance(one, cls)]
    return f"{text} {', '.join(bounds)}" if bounds else text
