"""Which format a table has, detected from its columns, and its rows as examples.

The formats stand in `format_table`. If several fit, or none, the error names the columns and the line to write. Pairs
of answers are detected where no other format fits; judged answers and prompts only for a caller who asks for them. It
knows no file, no tokenizer and no model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kitout.data.examples.column_hints import naming_line
from kitout.data.examples.examples import Example, cell_to_text
from kitout.data.examples.format_table import FORMATS, KINDS, STAGES, Format
from kitout.data.examples.preferences import Prompt
from kitout.data.examples.system_prompt import with_system_prompt
from kitout.data.read.tables import MAX_MESSAGE_CHARS, DataError, Row, add_first
from kitout.errors import BadRows, Errors, UnusableFormat, suggest

MAX_SHOWN_COLUMNS = 40
HEAD_ROWS = 200  # rows of a stream that detection reads; later ones may leave columns out

# Metadata columns. With any other column beside it, `text` alone is not taken as plain text.
_METADATA_PATTERN = re.compile(
    r"(?i)(.*[_ ])?(id|idx|index|url|uri|source|title|date|time|timestamp|added|created|meta|metadata|lang|language"
    r"|dump|path|file|filename|name|author|licen[cs]e|subset|split|domain|count|length|len|tokens|score|hash|__.*)"
)

_DECIMAL_COMMA_PATTERN = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?")
_THOUSANDS_PATTERN = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")  # 1,000: a comma may mean either


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
                row_fields["label"] = with_decimal_point(row_fields["label"])
            example = self.format.to_example({role: nan_to_none(value) for role, value in row_fields.items()})
            if self.system_prompt:
                example = with_system_prompt(example, self.system_prompt)
            if self.group is not None:
                example = replace(example, group=_group_of(cells, self.group))
            if isinstance(example, Prompt) and self.format.keeps_row:
                example = replace(example, row=dict(cells))
        except DataError as error:
            raise DataError(f"line {line}: {name_columns(str(error), self.columns)}"[:MAX_MESSAGE_CHARS]) from error
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

    def as_asked(self) -> tuple[str, dict[str, str]]:
        """The format of plain training and its columns by which a model that was trained on the table is asked.

        Of preference data: of their prompts.
        """
        name, columns = self.format.name, dict(self.columns)
        if self.format.kind == "training":
            return name, columns
        roles = {"prompt": "prompt"} if name.startswith("raw_") else {"prompt": "instruction"}
        roles |= {"question": "question", "choices": "choices", "context": "context", "system": "system"}
        asked = {roles[role]: column for role, column in columns.items() if role in roles}
        if "instruction" in asked:
            return "instruction", asked
        if "question" in asked:
            return "question", asked
        return ("completion", asked) if name.startswith("raw_") else ("messages", {})

    def __str__(self) -> str:
        read = ", ".join(column if role == column else f"{role}={column}" for role, column in self.columns.items())
        commas = ", numbers with a decimal comma" if self.has_decimal_commas else ""
        verb = "kept for rewards" if self.format.keeps_row else "not read"
        unused = f"{verb}: {', '.join(self.unused_columns)}" if self.unused_columns else ""
        return "; ".join(filter(None, (f"{self.format.name} ({read}{commas})", self.note, unused)))


def name_columns(message: str, columns: Mapping[str, str]) -> str:
    """'response' is empty -> 'output' is empty: the user knows the column, not the role. columns: by role."""
    for role, column in columns.items():
        for named, shown in ((repr(role), repr(column)), (f"{role}:", f"{column}:")):
            if message.startswith(named):
                return shown + message[len(named) :]
    return message


def detect(
    rows: Sequence[Row],
    source: str,
    format: str | None = None,  # noqa: A002 - the name of the setting
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    note: str = "",
    kinds: Collection[str] | None = None,
) -> TableReading:
    """How these rows are read.

    format: a name of FORMATS, or "auto". columns: {role: column} for columns with unusual names. system_prompt, note:
    see TableReading. kinds: of KINDS, which the caller can use: UnusableFormat for a table of another kind; None: all,
    of which judged answers and prompts must be named.
    """
    present = list(dict.fromkeys(str(column) for _, row in rows for column in row))
    requested = dict(columns or {})
    format = None if format == "auto" else format  # noqa: A001
    candidates = _candidate_formats(format, requested, present, source, kinds)
    matches = {each.name: match for each in candidates if (match := _match_columns(each, requested, present))}
    matches = {name: match for name, match in matches.items() if FORMATS[name].variant_of not in matches}
    if kinds is None or "training" in kinds:  # whoever trains on such a table goes on to do so
        matches = _without(matches, "preference") if len(matches) > 1 and format is None else matches
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
    has_commas = name == "label" and are_decimal_commas([row.get(match["label"]) for _, row in rows])
    reading = TableReading(FORMATS[name], match, source, unused, system_prompt, has_commas, note)
    if kinds is not None and reading.format.kind not in kinds:
        needed = " or ".join(KINDS[kind] for kind in kinds)
        raise UnusableFormat(
            f"{source} has {KINDS[reading.format.kind]} ({reading}); needed are {needed}", reading, rows[0][1]
        )
    return reading


def _without(matches: Mapping[str, dict[str, str]], name: str) -> dict[str, dict[str, str]]:
    return {other: match for other, match in matches.items() if other != name}


def _group_of(cells: Mapping[str, Any], column: str) -> str:
    value = nan_to_none(cells.get(column))
    if value is None or not str(value).strip():
        raise DataError(f"{column!r} is empty, which says the group of the row")
    return cell_to_text(value)


def are_decimal_commas(labels: Sequence[Any]) -> bool:
    """Whether all labels are numbers as text and some have a comma that cannot separate thousands."""
    texts = [label.strip() for label in labels if isinstance(label, str) and label.strip()]
    return (
        any("," in text and not _THOUSANDS_PATTERN.fullmatch(text) for text in texts)
        and all(_DECIMAL_COMMA_PATTERN.fullmatch(text) for text in texts)
    )  # fmt: skip


def with_decimal_point(label: Any) -> Any:
    """A number with a decimal comma with a point instead; anything else as it is."""
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
    kinds: Collection[str] | None,
) -> list[Format]:
    """The formats that are compatible with what was requested."""
    errors = Errors(DataError, f"{source} (columns: {shown(present)})")
    if format is not None and format not in FORMATS:
        errors.add(f"there is no format {format!r}; {suggest(format, FORMATS, max_shown=len(FORMATS))}")
    candidates = [each for each in FORMATS.values() if format is not None and format in (each.name, each.variant_of)]
    candidates = candidates or [each for each in FORMATS.values() if _is_candidate(each, kinds)]
    roles = {role for each in candidates for role in each.roles}
    for role, column in columns.items():
        if role not in roles:
            owner = f"the format {format}" if format in FORMATS else "any format"
            errors.add(f"{role!r} is not a column of {owner}; {suggest(role, sorted(roles), max_shown=20)}")
        if column not in present:
            errors.add(f"there is no column {column!r} (requested as {role!r}); {suggest(column, present)}")
    errors.raise_if_any()
    return [each for each in candidates if set(columns) <= set(each.roles)]


def _is_candidate(each: Format, kinds: Collection[str] | None) -> bool:
    """Whether it may be detected. Pairs are where they cannot be used too: an error can then say what they are for."""
    if kinds is None or each.detected != "if_wanted":
        wanted = kinds is None or each.kind in kinds or ("training" in kinds and each.kind == "preference")
        return each.detected == "always" and wanted
    return each.kind in kinds


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
    if requested is None and candidates[0].kind != "training":
        requested = candidates[0].name
    roles = tuple(candidates[0].required) if requested else None
    reading = f"the format {requested}" if requested else "any known format"
    line = naming_line([row for _, row in rows], present, roles, requested or "")
    required = "\n    ".join(map(str, candidates))
    others = _other_kinds(candidates[0].kind, present)
    return f"{columns}\n  they do not fit {reading}; {others}{line}\n  required are\n    {required}"


def _other_kinds(kind: str, present: Sequence[str]) -> str:
    """What a table that is no data of this kind of alignment is for, in words; "" where it is of no other kind."""
    if kind == "training":
        return ""
    fitting = {
        each.kind: each.name
        for each in FORMATS.values()
        if each.kind != kind and each.detected != "never" and _match_columns(each, {}, present) is not None
    }
    if len(fitting) > 1:
        fitting.pop("prompts", None)  # which other data have too
    texts = [f"{KINDS[kind]} (format {name}), which {STAGES[kind]} takes" for kind, name in fitting.items()]
    return f"they fit {', or '.join(texts)}; else " if texts else ""


def to_examples(rows: Sequence[Row], source: str, **options: Any) -> list[Example]:
    """The rows of one table as examples. options: those of `detect`."""
    return detect(rows, source, **options).to_examples(rows)
