"""Which format a table has, found from its columns, and its rows as examples.

A format is its columns' roles with their usual names and the function that makes an example of them (`convert`); the
table below is all there is to it. What cannot be told apart, or is not known, is asked for with the line to write.
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
from kitout.data.examples.examples import Example
from kitout.data.read.tables import DataError, Row, add_first
from kitout.errors import Errors, suggest

ColumnNames: TypeAlias = "Mapping[str, tuple[str, ...]]"  # role -> its usual column names, the first that is there wins

HEAD_ROWS = 200  # rows of a stream whose columns are looked at; later ones may leave columns out
_SYSTEM: dict[str, tuple[str, ...]] = {"system": ("system", "system_prompt")}
_TOOLS: dict[str, tuple[str, ...]] = {"tools": ("tools", "functions")}
_LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "score")
_TEXTS = (
    "text", "sentence", "sentence1", "premise", "text1", "question1", "tweet", "review", "comment", "content", "body",
)  # fmt: skip

# Columns that say something about a text without being learnt; with any other beside it, `text` is not taken alone.
_METADATA_PATTERN = re.compile(
    r"(?i)(.*[_ ])?(id|idx|index|url|uri|source|title|date|time|timestamp|added|created|meta|metadata|lang|language"
    r"|dump|path|file|filename|name|author|licen[cs]e|subset|split|domain|count|length|len|tokens|score|hash|__.*)"
)


@dataclass(frozen=True)
class Format:
    name: str
    required: ColumnNames
    to_example: Callable[[convert.RowFields], Example]
    optional: ColumnNames = field(default_factory=dict)
    by_name_only: bool = False
    """Taken only where it is asked for: tables of texts may have the same columns beside their own."""

    @property
    def roles(self) -> ColumnNames:
        return {**self.required, **self.optional}

    def __str__(self) -> str:
        perhaps = f"; perhaps {', '.join(self.optional)}" if self.optional else ""
        needs = ["/".join(names[:3]) + ("/..." if len(names) > 3 else "") for names in self.required.values()]
        return f"{self.name}: {' and '.join(needs)}{perhaps}"


FORMATS = {
    made.name: made
    for made in (
        Format(
            "instruction",
            {
                "instruction": ("instruction", "prompt", "input", "query", "source"),
                "response": ("response", "output", "answer", "target"),
            },
            convert.from_instruction,
            {"context": ("input", "context"), **_SYSTEM},
        ),
        Format("messages", {"messages": ("messages", "dialog", "chat")}, convert.from_messages, {**_TOOLS, **_SYSTEM}),
        Format(
            "sharegpt",
            {"conversations": ("conversations", "conversation")},
            convert.from_sharegpt,
            {**_TOOLS, **_SYSTEM},
        ),
        Format("completion", {"prompt": ("prompt",), "completion": ("completion",)}, convert.from_completion, _TOOLS),
        Format(
            "question",
            {"question": ("question", "problem"), "answer": ("answer", "answers", "solution", "response", "output")},
            convert.from_question,
            {"context": ("context", "passage", "paragraph", "article", "body"), "choices": ("choices", "options"),
             **_SYSTEM},
        ),
        Format(
            "summary",
            {"document": ("document", "article", "dialogue", "text"), "summary": ("summary", "highlights")},
            convert.from_summary,
            _SYSTEM,
        ),
        Format(
            "label",
            {"text": _TEXTS, "label": _LABELS},
            convert.from_label,
            {"second": ("sentence2", "hypothesis", "text2", "question2", "text_pair", "second")},
        ),
        Format(
            "tokens",
            {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "labels", "pos_tags")},
            convert.from_tokens,
        ),
        Format("spans", {"text": ("text", "sentence"), "spans": ("spans", "entities")}, convert.from_spans),
        Format("text", {"text": ("text", "content")}, convert.from_text),
        Format(
            "image",
            {
                "image": ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img"),
                "label": ("label", "labels", "class", "category", "target", "species", "digit"),
            },
            convert.from_image,
            by_name_only=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class TableReading:
    """A format and the column of each of its roles. unused: columns that nothing is read from.

    where: the source's name, for messages and places. instruction: a system turn for every example; with it, labelled
    texts become chats.
    """

    format: Format
    columns: Mapping[str, str]
    source: str
    unused_columns: tuple[str, ...] = ()
    system_prompt: str | None = None

    def to_example(self, row: Row) -> Example:
        """Raises DataError with the line and what is wrong with it."""
        line, cells = row
        try:
            if not self._late_columns.isdisjoint(cells):
                late = ", ".join(map(repr, sorted(self._late_columns & cells.keys())))
                raise DataError(f"it has the column {late}, which the first {HEAD_ROWS} rows do not have; add it there")
            made = self.format.to_example(
                {role: _gap_to_none(cells.get(column)) for role, column in self.columns.items()}
            )
            if self.system_prompt:
                made = convert.with_system_prompt(made, self.system_prompt)
        except DataError as wrong:
            raise DataError(f"line {line}: {self._name_columns(str(wrong))}") from wrong
        return replace(made, location=f"{self.source}:{line}")

    @cached_property
    def _late_columns(self) -> frozenset[str]:
        """Columns that would be read if the rows that were looked at had them: a stream may bring one later."""
        usual = {name for role, names in self.format.roles.items() if role not in self.columns for name in names}
        return frozenset(usual - {*self.unused_columns, *self.columns.values()})

    def to_examples(self, rows: Iterable[Row]) -> list[Example]:
        """Every row as an example; the faulty ones are told together."""
        made, bad = [], []
        for row in rows:
            try:
                made.append(self.to_example(row))
            except DataError as wrong:
                bad.append(str(wrong))
        faults = Errors(DataError, f"{self.source} (read as {self.format.name})")
        add_first(faults, bad, "rows")
        faults.raise_if_any()
        return made

    def _name_columns(self, message: str) -> str:
        """'response' is empty -> 'output' is empty: the user knows the column, not the role."""
        for role, column in self.columns.items():
            if message.startswith(f"{role!r}"):
                return f"{column!r}{message[len(repr(role)) :]}"
        return message

    def __str__(self) -> str:
        read = ", ".join(column if role == column else f"{role}={column}" for role, column in self.columns.items())
        return f"{self.format.name} ({read})" + (
            f"; not read: {', '.join(self.unused_columns)}" if self.unused_columns else ""
        )


def detect(
    rows: Sequence[Row],
    source: str,
    format: str | None = None,  # noqa: A002 - the name of the setting
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
) -> TableReading:
    """The layout of these rows.

    format: a name of FORMATS, or "auto". columns: {role: column} for what has an unusual name. instruction: see Layout.
    """
    present = list(dict.fromkeys(str(column) for _, row in rows for column in row))
    named = dict(columns or {})
    format = None if format == "auto" else format  # noqa: A001
    known = _candidate_formats(format, named, present, source)
    fits = {made.name: found for made in known if (found := _match_columns(made, named, present)) is not None}
    plain = fits.get("text")
    if plain is not None and format is None and not named:
        others = [c for c in present if c not in plain.values() and not _METADATA_PATTERN.fullmatch(c)]
        if len(fits) > 1 or others:
            del fits["text"]
    elif len(fits) > 1:
        fits.pop("text", None)
    if len(fits) != 1:
        raise DataError(_ambiguity_message(source, present, list(fits), known, format))
    (name, found), *_ = fits.items()
    unused = tuple(c for c in present if c not in found.values())
    return TableReading(FORMATS[name], found, source, unused, system_prompt)


def _gap_to_none(value: Any) -> Any:
    """A gap that came as a number is a gap."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _candidate_formats(
    format: str | None,  # noqa: A002 - the name of the setting
    columns: Mapping[str, str],
    present: Sequence[str],
    source: str,
) -> list[Format]:
    """The formats that what was asked for leaves open."""
    faults = Errors(DataError, f"{source} (columns: {', '.join(present)})")
    if format is not None and format not in FORMATS:
        faults.add(f"there is no format {format!r}; {suggest(format, FORMATS, max_shown=len(FORMATS))}")
    by_columns = [made for made in FORMATS.values() if not made.by_name_only]
    open_ones = [FORMATS[format]] if format in FORMATS else by_columns
    roles = {role for made in open_ones for role in made.roles}
    for role, column in columns.items():
        if role not in roles:
            of = f"the format {format} has" if format in FORMATS else "any format has"
            faults.add(f"{role!r} is no column that {of}; {suggest(role, sorted(roles), max_shown=20)}")
        if column not in present:
            faults.add(f"there is no column {column!r} (asked for as {role!r}); {suggest(column, present)}")
    faults.raise_if_any()
    return [made for made in open_ones if set(columns) <= set(made.roles)]


def _match_columns(candidate: Format, columns: Mapping[str, str], present: Sequence[str]) -> dict[str, str] | None:
    """The column of each role, or None where one that is needed is missing. No column serves two roles."""
    found = {role: column for role, column in columns.items() if role in candidate.roles}
    for role, usual in candidate.roles.items():
        free = [c for c in present if c not in found.values()]
        column = found.get(role) or next((c for name in usual for c in free if c.lower() == name), None)
        if column is not None:
            found[role] = column
        elif role in candidate.required:
            return None
    return {role: found[role] for role in candidate.roles if role in found}


def _ambiguity_message(
    source: str, present: Sequence[str], fits: Sequence[str], candidates: Sequence[Format], requested: str | None
) -> str:
    shown = f"{source} has the columns: {', '.join(present)}"
    if fits:
        return f"{shown}\n  they can be read as {' or as '.join(fits)}\n  say which, e.g. format={fits[0]!r}"
    likely = candidates[0] if requested else FORMATS["label"]
    spare = [*present, *likely.required][: len(likely.required)]
    example = ", ".join(f"{role!r}: {column!r}" for role, column in zip(likely.required, spare, strict=False))
    reading = f"the format {requested}" if requested else "any known format"
    return (
        f"{shown}\n  they do not fit {reading}; needed are\n    "
        + "\n    ".join(str(made) for made in candidates)
        + f"\n  name them, e.g. format={likely.name!r}, columns={{{example}}}"
    )


def to_examples(rows: Sequence[Row], source: str, **options: Any) -> list[Example]:
    """The rows of one table as examples; how: what `detect` takes."""
    return detect(rows, source, **options).to_examples(rows)
