"""The cells of a row by role: texts that must be there, texts that may be empty, lists, JSON.

A function gets the row's cells by role and raises a DataError that names the cell and its value; the caller adds the
line and puts the column's name in the place of the role. It knows no file and no kind of example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from kitout.data.examples.examples import cell_to_text
from kitout.data.read.json_text import parse_json
from kitout.data.read.tables import DataError
from kitout.format import short_repr

RowFields: TypeAlias = Mapping[str, Any]  # role -> value; roles that the row leaves empty are None


def required_text(row_fields: RowFields, role: str, strip: bool = True) -> str:
    value = row_fields.get(role)
    if value is None or isinstance(value, list | dict) or not cell_to_text(value).strip():
        raise DataError(f"{role!r} is {shorten_cell(value)}, expected text")
    return cell_to_text(value).strip() if strip else cell_to_text(value)


def answer_text(row_fields: RowFields, role: str) -> str:
    """An answer keeps the white space it begins with: indentation is a part of code."""
    return required_text(row_fields, role, strip=False).rstrip()


def optional_text(row_fields: RowFields, role: str) -> str:
    """The text of a cell that may be empty; a list of passages counts as one text."""
    value = row_fields.get(role)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if value is None or not cell_to_text(value).strip():
        return ""
    return required_text({**row_fields, role: value}, role)


def required_list(row_fields: RowFields, role: str) -> list[Any]:
    value = row_fields.get(role)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_cell(value, role)
    if not isinstance(value, list) or not value:
        raise DataError(f"{role!r} is {shorten_cell(value)}, expected a list that is not empty")
    return value


def parse_cell(text: Any, description: str) -> Any:
    try:
        return parse_json(text) if isinstance(text, str) else text
    except DataError as error:
        raise DataError(f"{description}: {error}: {shorten_cell(text)}") from error


def shorten_cell(value: object) -> str:
    return "empty" if value is None or value == "" else short_repr(value, 60)
