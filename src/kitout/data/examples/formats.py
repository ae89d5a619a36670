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
from kitout.data.read.tables import DataError, Row, told
from kitout.errors import Faults, suggest

Names: TypeAlias = "Mapping[str, tuple[str, ...]]"  # role -> its usual column names, the first that is there wins

LOOKED_AT = 200  # rows of a stream whose columns are looked at; later ones may leave columns out
_SYSTEM: dict[str, tuple[str, ...]] = {"system": ("system", "system_prompt")}
_TOOLS: dict[str, tuple[str, ...]] = {"tools": ("tools", "functions")}
_LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "score")
_TEXTS = (
    "text", "sentence", "sentence1", "premise", "text1", "question1", "tweet", "review", "comment", "content", "body",
)  # fmt: skip

# Columns that say something about a text without being learnt; with any other beside it, `text` is not taken alone.
_ABOUT = re.compile(
    r"(?i)(.*[_ ])?(id|idx|index|url|uri|source|title|date|time|timestamp|added|created|meta|metadata|lang|language"
    r"|dump|path|file|filename|name|author|licen[cs]e|subset|split|domain|count|length|len|tokens|score|hash|__.*)"
)


@dataclass(frozen=True)
class Format:
    name: str
    needs: Names
    make: Callable[[convert.Cells], Example]
    may: Names = field(default_factory=dict)
    by_name_only: bool = False
    """Taken only where it is asked for: tables of texts may have the same columns beside their own."""

    @property
    def roles(self) -> Names:
        return {**self.needs, **self.may}

    def __str__(self) -> str:
        perhaps = f"; perhaps {', '.join(self.may)}" if self.may else ""
        needs = ["/".join(names[:3]) + ("/..." if len(names) > 3 else "") for names in self.needs.values()]
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
            convert.instruction,
            {"context": ("input", "context"), **_SYSTEM},
        ),
        Format("messages", {"messages": ("messages", "dialog", "chat")}, convert.chat, {**_TOOLS, **_SYSTEM}),
        Format(
            "sharegpt", {"conversations": ("conversations", "conversation")}, convert.sharegpt, {**_TOOLS, **_SYSTEM}
        ),
        Format("completion", {"prompt": ("prompt",), "completion": ("completion",)}, convert.completion, _TOOLS),
        Format(
            "question",
            {"question": ("question", "problem"), "answer": ("answer", "answers", "solution", "response", "output")},
            convert.question,
            {"context": ("context", "passage", "paragraph", "article", "body"), "choices": ("choices", "options"),
             **_SYSTEM},
        ),
        Format(
            "summary",
            {"document": ("document", "article", "dialogue", "text"), "summary": ("summary", "highlights")},
            convert.summary,
            _SYSTEM,
        ),
        Format(
            "label",
            {"text": _TEXTS, "label": _LABELS},
            convert.label,
            {"second": ("sentence2", "hypothesis", "text2", "question2", "text_pair", "second")},
        ),
        Format(
            "tokens",
            {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "labels", "pos_tags")},
            convert.tokens,
        ),
        Format("spans", {"text": ("text", "sentence"), "spans": ("spans", "entities")}, convert.spans),
        Format("text", {"text": ("text", "content")}, convert.plain),
        Format(
            "image",
            {
                "image": ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img"),
                "label": ("label", "labels", "class", "category", "target", "species", "digit"),
            },
            convert.image,
            by_name_only=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A format and the column of each of its roles. unused: columns that nothing is read from.

    where: the source's name, for messages and places. instruction: a system turn for every example; with it, labelled
    texts become chats.
    """

    format: Format
    columns: Mapping[str, str]
    where: str
    unused: tuple[str, ...] = ()
    instruction: str | None = None

    def example(self, row: Row) -> Example:
        """Raises DataError with the line and what is wrong with it."""
        line, cells = row
        try:
            if not self._late.isdisjoint(cells):
                late = ", ".join(map(repr, sorted(self._late & cells.keys())))
                raise DataError(f"it has the column {late}, which the first {LOOKED_AT} rows do not have; add it there")
            made = self.format.make({role: _cell(cells.get(column)) for role, column in self.columns.items()})
            if self.instruction:
                made = convert.instructed(made, self.instruction)
        except DataError as wrong:
            raise DataError(f"line {line}: {self._columns_named(str(wrong))}") from wrong
        return replace(made, place=f"{self.where}:{line}")

    @cached_property
    def _late(self) -> frozenset[str]:
        """Columns that would be read if the rows that were looked at had them: a stream may bring one later."""
        usual = {name for role, names in self.format.roles.items() if role not in self.columns for name in names}
        return frozenset(usual - {*self.unused, *self.columns.values()})

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """Every row as an example; the faulty ones are told together."""
        made, bad = [], []
        for row in rows:
            try:
                made.append(self.example(row))
            except DataError as wrong:
                bad.append(str(wrong))
        faults = Faults(DataError, f"{self.where} (read as {self.format.name})")
        told(faults, bad, "rows")
        faults.raise_if_any()
        return made

    def _columns_named(self, message: str) -> str:
        """'response' is empty -> 'output' is empty: the user knows the column, not the role."""
        for role, column in self.columns.items():
            if message.startswith(f"{role!r}"):
                return f"{column!r}{message[len(repr(role)) :]}"
        return message

    def __str__(self) -> str:
        read = ", ".join(column if role == column else f"{role}={column}" for role, column in self.columns.items())
        return f"{self.format.name} ({read})" + (f"; not read: {', '.join(self.unused)}" if self.unused else "")


def detect(
    rows: Sequence[Row],
    where: str,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    instruction: str | None = None,
) -> Layout:
    """The layout of these rows.

    format: a name of FORMATS, or "auto". columns: {role: column} for what has an unusual name. instruction: see Layout.
    """
    present = list(dict.fromkeys(str(column) for _, row in rows for column in row))
    named = dict(columns or {})
    format = None if format == "auto" else format  # noqa: A001
    known = _asked(format, named, present, where)
    fits = {made.name: found for made in known if (found := _fit(made, named, present)) is not None}
    plain = fits.get("text")
    if plain is not None and format is None and not named:
        others = [c for c in present if c not in plain.values() and not _ABOUT.fullmatch(c)]
        if len(fits) > 1 or others:
            del fits["text"]
    elif len(fits) > 1:
        fits.pop("text", None)
    if len(fits) != 1:
        raise DataError(_unclear(where, present, list(fits), known, format))
    (name, found), *_ = fits.items()
    unused = tuple(c for c in present if c not in found.values())
    return Layout(FORMATS[name], found, where, unused, instruction)


def _cell(value: Any) -> Any:
    """A gap that came as a number is a gap."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _asked(format: str | None, named: Mapping[str, str], present: Sequence[str], where: str) -> list[Format]:  # noqa: A002
    """The formats that what was asked for leaves open."""
    faults = Faults(DataError, f"{where} (columns: {', '.join(present)})")
    if format is not None and format not in FORMATS:
        faults.add(f"there is no format {format!r}; {suggest(format, FORMATS, most=len(FORMATS))}")
    by_columns = [made for made in FORMATS.values() if not made.by_name_only]
    open_ones = [FORMATS[format]] if format in FORMATS else by_columns
    roles = {role for made in open_ones for role in made.roles}
    for role, column in named.items():
        if role not in roles:
            of = f"the format {format} has" if format in FORMATS else "any format has"
            faults.add(f"{role!r} is no column that {of}; {suggest(role, sorted(roles), most=20)}")
        if column not in present:
            faults.add(f"there is no column {column!r} (asked for as {role!r}); {suggest(column, present)}")
    faults.raise_if_any()
    return [made for made in open_ones if set(named) <= set(made.roles)]


def _fit(made: Format, named: Mapping[str, str], present: Sequence[str]) -> dict[str, str] | None:
    """The column of each role, or None where one that is needed is missing. No column serves two roles."""
    found = {role: column for role, column in named.items() if role in made.roles}
    for role, usual in made.roles.items():
        free = [c for c in present if c not in found.values()]
        column = found.get(role) or next((c for name in usual for c in free if c.lower() == name), None)
        if column is not None:
            found[role] = column
        elif role in made.needs:
            return None
    return {role: found[role] for role in made.roles if role in found}


def _unclear(
    where: str, present: Sequence[str], fits: Sequence[str], known: Sequence[Format], asked: str | None
) -> str:
    shown = f"{where} has the columns: {', '.join(present)}"
    if fits:
        return f"{shown}\n  they can be read as {' or as '.join(fits)}\n  say which, e.g. format={fits[0]!r}"
    likely = known[0] if asked else FORMATS["label"]
    spare = [*present, *likely.needs][: len(likely.needs)]
    example = ", ".join(f"{role!r}: {column!r}" for role, column in zip(likely.needs, spare, strict=False))
    reading = f"the format {asked}" if asked else "any known format"
    return (
        f"{shown}\n  they do not fit {reading}; needed are\n    "
        + "\n    ".join(str(made) for made in known)
        + f"\n  name them, e.g. format={likely.name!r}, columns={{{example}}}"
    )


def examples(rows: Sequence[Row], where: str, **how: Any) -> list[Example]:
    """The rows of one table as examples; how: what `detect` takes."""
    return detect(rows, where, **how).examples(rows)
