"""Settings that are numbers refuse true and false, which pydantic reads as 1 and 0.

`encoder: true` would train a hidden layer of width 1, `steps: true` one step, and nothing would say so. It knows types
and values of settings, and no setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

OTHERS = (bool, Any, object, True, False)  # types, and values of a Literal, that true and false have a place in


def refuse_booleans(annotation: Any, value: Any) -> None:
    """ValueError where a number is meant and the value, or one in lists or mappings of them, is true or false."""
    found = next(filter(lambda each: isinstance(each, bool), _values_in(value)), None)
    if found is None:
        return
    types = _types_in(annotation)
    has_place = any(each is other for each in types for other in OTHERS)
    if (int in types or float in types) and not has_place:
        raise ValueError(f"expected a number, found {str(found).lower()}: write the number that is meant")


def _values_in(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    return [each for part in value for each in _values_in(part)] if isinstance(value, (list, tuple)) else [value]


def _types_in(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [each for part in inner for each in _types_in(part)] if inner else [annotation]
