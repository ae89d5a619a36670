"""Values of Arrow tables (parquet files, data sets of the hub) as the rows of other files have them.

Bytes are text where they are UTF-8, and stay bytes where they are an image; an image with its path is one of both.
Classes that a table keeps as numbers get their names, which the `datasets` library writes into the file. It knows no
format of examples, and opens no image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_IMAGE_STRUCT = {"bytes", "path"}  # how the datasets library writes an image


def plain_value(value: Any) -> Any:
    """A cell without bytes, except of images."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, Mapping):
        if set(value) == _IMAGE_STRUCT:
            return value["path"] if value["bytes"] is None else value["bytes"]
        return {key: plain_value(one) for key, one in value.items()}
    return [plain_value(one) for one in value] if isinstance(value, list) else value


def class_names_of_file(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Column -> names of its classes, as the datasets library writes them into a parquet file."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])
        features = info["info"]["features"].items()
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ):  # not written by it
        return {}
    names = {column: _names_of(feature) for column, feature in features}
    return {column: found for column, found in names.items() if found}


def name_classes(names: Sequence[str], value: Any) -> Any:
    """The name of a class number, or of each in a list. None for -1, which stands for a label that is kept secret."""
    if isinstance(value, list):
        return [name_classes(names, one) for one in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return None if value is None else value
    return names[value] if 0 <= value < len(names) else None


def _names_of(feature: Any) -> list[str]:
    if isinstance(feature, list) and len(feature) == 1:  # how earlier versions write a list
        feature = feature[0]
    if not isinstance(feature, Mapping):
        return []
    if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list):
        return [str(name) for name in feature["names"]]
    return _names_of(feature.get("feature"))
