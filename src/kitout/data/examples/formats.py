"""Which format a table has, detected from its columns, and its rows as examples.

A format is the roles of its columns, their usual names, and the function that makes an example of them (`convert`); the
table below is all there is to it. If several formats fit, or none, the error names the columns and the line to write.
It knows no file, no tokenizer and no model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from kitout.data.examples import convert
from kitout.data.examples.column_hints import naming_line
from kitout.data.examples.examples import Example, cell_to_text
from kitout.data.examples.system_prompt import with_system_prompt
from kitout.data.read.tables import MAX_MESSAGE_CHARS, DataError, Row, add_first
from kitout.errors import BadRows, Errors, suggest

ColumnNames: TypeAlias = "Mapping[str, tuple[str, ...]]"  # role -> its usual column names, the first one present wins

MAX_SHOWN_COLUMNS = 40
HEAD_ROWS = 200  # rows of a stream that detection reads; later ones may leave columns out
_SYSTEM: dict[str, tuple[str, ...]] = {"system": ("system", "system_prompt")}
_TOOLS: dict[str, tuple[str, ...]] = {"tools": ("tools", "functions")}
_LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "score")
_TEXTS = (
    "text", "sentence", "sentence1", "premise", "text1", "question1", "tweet", "review", "comment", "content", "body",
)  # fmt: skip

# Metadata columns. With any other column beside it, `text` alone is not taken as plain text.
_METADATA_PATTERN = re.compile(
    r"(?i)(.*[_ ])?(id|idx|index|url|uri|source|title|date|time|timestamp|added|created|meta|metadata|lang|language"
    r"|dump|path|file|filename|name|author|licen[cs]e|subset|split|domain|count|length|len|tokens|score|hash|__.*)"
)

_DECIMAL_COMMA_PATTERN = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?")
_THOUSANDS_PATTERN = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")  # 1,000: a comma may mean either


@dataclass(frozen=True)
class Format:
    """Columns by role, and what makes an example of them."""

    name: str
    """As `format=` names it."""
    required: ColumnNames
    """Roles that a table must have."""
    to_example: Callable[[convert.RowFields], Example]
    """One row, by role, as an example."""
    answer: str = ""
    """The role that is predicted; "" where it is part of the input's own column, or nothing is. The first required role
    is the input that a plain text stands for."""
    optional: ColumnNames = field(default_factory=dict)
    """Roles that a table may have."""
    by_name_only: bool = False
    """Never detected, only taken when named: tables of texts may have the same columns beside their own."""

    @property
    def roles(self) -> ColumnNames:
        """Required and optional ones."""
        return {**self.required, **self.optional}

    def __str__(self) -> str:
        optional = f"; optional {', '.join(self.optional)}" if self.optional else ""
        required = ["/".join(names[:3]) + ("/..." if len(names) > 3 else "") for names in self.required.values()]
        return f"{self.name}: {' and '.join(required)}{optional}"


FORMATS = {
    each.name: each
    for each in (
        Format(
            "instruction",
            {
                "instruction": ("instruction", "prompt", "input", "query", "source"),
                "response": ("response", "output", "answer", "target"),
            },
            convert.from_instruction,
            "response",
            {"context": ("input", "context"), **_SYSTEM},
        ),
        Format(
            "messages",
            {"messages": ("messages", "dialog", "chat")},
            convert.from_messages,
            optional={**_TOOLS, **_SYSTEM},
        ),
        Format(
            "sharegpt",
            {"conversations": ("conversations", "conversation")},
            convert.from_sharegpt,
            optional={**_TOOLS, **_SYSTEM},
        ),
        Format(
            "completion",
            {"prompt": ("prompt",), "completion": ("completion",)},
            convert.from_completion,
            "completion",
            _TOOLS,
        ),
        Format(
            "question",
            {"question": ("question", "problem"), "answer": ("answer", "answers", "solution", "response", "output")},
            convert.from_question,
            "answer",
            {"context": ("context", "passage", "paragraph", "article", "body"), "choices": ("choices", "options"),
             **_SYSTEM},
        ),
        Format(
            "summary",
            {"document": ("document", "article", "dialogue", "text"), "summary": ("summary", "highlights")},
            convert.from_summary,
            "summary",
            _SYSTEM,
        ),
        Format(
            "label",
            {"text": _TEXTS, "label": _LABELS},
            convert.from_label,
            "label",
            {"second": ("sentence2", "hypothesis", "text2", "question2", "text_pair", "second")},
        ),
        Format(
            "tokens",
            {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "labels", "pos_tags")},
            convert.from_tokens,
            "tags",
        ),
        Format("spans", {"text": ("text", "sentence"), "spans": ("spans", "entities")}, convert.from_spans, "spans"),
        Format("text", {"text": ("text", "content")}, convert.from_text),
        Format(
            "image",
            {
                "image": ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img"),
                "label": ("label", "labels", "class", "category", "target", "species", "digit"),
            },
            convert.from_image,
            "label",
            by_name_only=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class TableReading:
    """How a table is read: its format and the column of each role."""

    format: Format
    """One of FORMATS."""
    columns: Mapping[str, str]
    """Role -> column."""
    source: str
    """The name of the table, for messages and locations."""
    unused_columns: tuple[str, ...] = ()
    """Columns that are not read."""
    system_prompt: str | None = None
    """A system turn for every example; with it, labeled texts become chats."""
    has_decimal_commas: bool = False
    """Whether the labels are numbers with decimal commas."""
    note: str = ""
    """What was found out about the file itself, in words."""
    group: str | None = None
    """The column whose value says which rows are about one thing; None: each row stands for itself."""

    def to_example(self, row: Row) -> Example:
        """Raises DataError with the line and the reason."""
        line, cells = row
        try:
            if not self._late_columns.isdisjoint(cells):
                late = ", ".join(map(repr, sorted(self._late_columns & cells.keys())))
                raise DataError(f"it has the column {late}, which the first {HEAD_ROWS} rows do not have; add it there")
            row_fields = {role: cells.get(column) for role, column in self.columns.items()}
            if self.has_decimal_commas:
                row_fields["label"] = _with_decimal_point(row_fields["label"])
            example = self.format.to_example({role: nan_to_none(value) for role, value in row_fields.items()})
            if self.system_prompt:
                example = with_system_prompt(example, self.system_prompt)
            if self.group is not None:
                example = replace(example, group=_group_of(cells, self.group))
        except DataError as error:
            raise DataError(f"line {line}: {self._name_columns(str(error))}"[:MAX_MESSAGE_CHARS]) from error
        return replace(example, location=f"{self.source}:{line}")

    @cached_property
    def _late_columns(self) -> frozenset[str]:
        """Columns that would be read if the first rows had them: a stream may bring one later."""
        usual = {name for role, names in self.format.roles.items() if role not in self.columns for name in names}
        return frozenset(usual - {*self.unused_columns, *self.columns.values()})

    def to_examples(self, rows: Iterable[Row], skipped: list[str] | None = None) -> list[Example]:
        """Every row as an example; all bad rows are reported together, or listed in `skipped`."""
        examples, messages = [], []
        for row in rows:
            try:
                examples.append(self.to_example(row))
            except DataError as error:
                messages.append(str(error))
        if skipped is not None:
            skipped.extend(f"{self.source} {message}" for message in messages)
            return examples
        errors = Errors(BadRows, f"{self.source} (read as {self.format.name})")
        add_first(errors, messages, "rows")
        errors.raise_if_any()
        return examples

    def _name_columns(self, message: str) -> str:
        """'response' is empty -> 'output' is empty: the user knows the column, not the role."""
        for role, column in self.columns.items():
            if message.startswith(f"{role!r}"):
                return f"{column!r}{message[len(repr(role)) :]}"
        return message

    def __str__(self) -> str:
        read = ", ".join(column if role == column else f"{role}={column}" for role, column in self.columns.items())
        commas = ", numbers with a decimal comma" if self.has_decimal_commas else ""
        unused = f"not read: {', '.join(self.unused_columns)}" if self.unused_columns else ""
        return "; ".join(filter(None, (f"{self.format.name} ({read}{commas})", self.note, unused)))


def detect(
    rows: Sequence[Row],
    source: str,
    format: str | None = None,  # noqa: A002 - the name of the setting
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    note: str = "",
) -> TableReading:
    """How these rows are read.

    format: a name of FORMATS, or "auto". columns: {role: column} for columns with unusual names. system_prompt, note:
    see TableReading.
    """
    present = list(dict.fromkeys(str(column) for _, row in rows for column in row))
    requested = dict(columns or {})
    format = None if format == "auto" else format  # noqa: A001
    candidates = _candidate_formats(format, requested, present, source)
    matches = {each.name: match for each in candidates if (match := _match_columns(each, requested, present))}
    plain_text = matches.get("text")
    if plain_text is not None and format is None and not requested:
        others = [c for c in present if c not in plain_text.values() and not _METADATA_PATTERN.fullmatch(c)]
        if len(matches) > 1 or others:
            del matches["text"]
    elif len(matches) > 1:
        matches.pop("text", None)
    if len(matches) != 1:
        raise DataError(_ambiguity_message(source, rows, present, list(matches), candidates, format))
    (name, match), *_ = matches.items()
    unused = tuple(c for c in present if c not in match.values())
    has_commas = name == "label" and _are_decimal_commas([row.get(match["label"]) for _, row in rows])
    return TableReading(FORMATS[name], match, source, unused, system_prompt, has_commas, note)


def _group_of(cells: Mapping[str, Any], column: str) -> str:
    value = nan_to_none(cells.get(column))
    if value is None or not str(value).strip():
        raise DataError(f"{column!r} is empty, which says the group of the row")
    return cell_to_text(value)


def _are_decimal_commas(labels: Sequence[Any]) -> bool:
    """Whether all labels are numbers as text and some have a comma that cannot separate thousands."""
    texts = [label.strip() for label in labels if isinstance(label, str) and label.strip()]
    return (
        any("," in text and not _THOUSANDS_PATTERN.fullmatch(text) for text in texts)
        and all(_DECIMAL_COMMA_PATTERN.fullmatch(text) for text in texts)
    )  # fmt: skip


def _with_decimal_point(label: Any) -> Any:
    is_number = isinstance(label, str) and _DECIMAL_COMMA_PATTERN.fullmatch(label.strip())
    return label.replace(".", "").replace(",", ".") if is_number else label


def shown(columns: Sequence[str]) -> str:
    """Names of columns for a message, the first of many."""
    shown = ", ".join(column[:80] for column in columns[:MAX_SHOWN_COLUMNS])
    return shown + (f", ... ({len(columns):,} in all)" if columns[MAX_SHOWN_COLUMNS:] else "")


def nan_to_none(value: Any) -> Any:
    """An empty cell of a numeric column comes as NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _candidate_formats(
    format: str | None,  # noqa: A002 - the name of the setting
    columns: Mapping[str, str],
    present: Sequence[str],
    source: str,
) -> list[Format]:
    """The formats that are compatible with what was requested."""
    errors = Errors(DataError, f"{source} (columns: {shown(present)})")
    if format is not None and format not in FORMATS:
        errors.add(f"there is no format {format!r}; {suggest(format, FORMATS, max_shown=len(FORMATS))}")
    detectable = [each for each in FORMATS.values() if not each.by_name_only]
    candidates = [FORMATS[format]] if format in FORMATS else detectable
    roles = {role for each in candidates for role in each.roles}
    for role, column in columns.items():
        if role not in roles:
            owner = f"the format {format}" if format in FORMATS else "any format"
            errors.add(f"{role!r} is not a column of {owner}; {suggest(role, sorted(roles), max_shown=20)}")
        if column not in present:
            errors.add(f"there is no column {column!r} (requested as {role!r}); {suggest(column, present)}")
    errors.raise_if_any()
    return [each for each in candidates if set(columns) <= set(each.roles)]


def _match_columns(candidate: Format, columns: Mapping[str, str], present: Sequence[str]) -> dict[str, str] | None:
    """The column of each role, or None if a required one is missing. No column has two roles."""
    match = {role: column for role, column in columns.items() if role in candidate.roles}
    for role, usual_names in candidate.roles.items():
        free = [c for c in present if c not in match.values()]
        column = match.get(role) or next((c for name in usual_names for c in free if c.lower() == name), None)
        if column is not None:
            match[role] = column
        elif role in candidate.required:
            return None
    return {role: match[role] for role in candidate.roles if role in match}


def _ambiguity_message(
    source: str, rows: Sequence[Row], present: Sequence[str], matches: Sequence[str], candidates: Sequence[Format],
    requested: str | None,
) -> str:  # fmt: skip
    columns = f"{source} has the columns: {shown(present)}"
    if matches:
        return (
            f"{columns}\n  they can be read as {' or as '.join(matches)}\n  choose one, e.g. "
            f"data.train.format={matches[0]}"
        )
    roles = tuple(candidates[0].required) if requested else None
    reading = f"the format {requested}" if requested else "any known format"
    line = naming_line([row for _, row in rows], present, roles, requested or "")
    required = "\n    ".join(map(str, candidates))
    return f"{columns}\n  they do not fit {reading}; {line}\n  required are\n    {required}"


def to_examples(rows: Sequence[Row], source: str, **options: Any) -> list[Example]:
    """The rows of one table as examples. options: those of `detect`."""
    return detect(rows, source, **options).to_examples(rows)
