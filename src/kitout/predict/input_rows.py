"""What `kitout predict` is given, as rows: a table, lines of text, images or a text; one after the other, none kept.

Which column holds what is found once, by what the adapter was trained on, else by the usual names; every row then
carries its place, the user's own columns and the input as a Predictor takes it. It knows no model and no output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from kitout.data.examples.examples import Example
from kitout.data.examples.format_table import FORMATS, Format
from kitout.data.examples.formats import are_decimal_commas, name_columns, nan_to_none, with_decimal_point
from kitout.data.read import tables
from kitout.errors import DataError, Errors, suggest
from kitout.files.usage_record import UsageRecord
from kitout.format import short_repr
from kitout.predict.answer_inputs import PAIR, answer_columns, answer_format, scores_answers
from kitout.predict.text_inputs import format_of
from kitout.train.objectives.tasks import USES

HEAD_ROWS = 200  # by which the columns are found
TEXT_COLUMNS = (
    "text", "sentence", "body", "content", "message", "review", "comment", "tweet", "prompt", "instruction", "question",
    "input", "description",
)  # fmt: skip
NOT_UTF8 = "it holds bytes that are no UTF-8 text"
EMPTY = "the line is empty"


@dataclass(frozen=True)
class InputRow:
    """One input, or why there is none."""

    place: str
    """File and line, for messages."""
    columns: Mapping[str, Any]
    """The user's own, which are kept beside the prediction."""
    value: Any = None
    """As a Predictor takes it."""
    problem: str = ""
    """Why it cannot be read."""


@dataclass
class InputRows:
    """Iterates over an input again and again (stdin once). column_names: role -> column, as the user gives them."""

    usage: UsageRecord
    """Of the adapter that is asked."""
    name: str
    """Of the input, for messages."""
    path: Path | None = None
    """A table, an image, or a folder of images; None: of lines."""
    lines: Iterable[str] = ()
    """Texts, where there is no file."""
    column_names: Mapping[str, str] = field(default_factory=dict)
    """What `--column` says."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of how it is read."""
    num_rows: int | None = None
    """How many there are, about; None where it is not known."""
    _columns: dict[str, str] = field(default_factory=dict)
    _present: list[str] = field(default_factory=list)
    _has_decimal_commas: bool = False

    @property
    def reads_images(self) -> bool:
        return USES[self.usage.task].reads_images

    @property
    def format(self) -> Format:
        """Of the rows of a table."""
        if scores_answers(self.usage):
            return answer_format(self.usage, [*self._present, *self.column_names])
        return FORMATS["image"] if self.reads_images else format_of(self.usage)

    @property
    def main_role(self) -> str:
        """What a text or an image alone stands for."""
        return next(role for role in self.format.roles if role != self.format.answer)

    @property
    def main_column(self) -> str:
        """Of inputs that have no columns."""
        if self.reads_images:
            return "image"
        return "prompt" if USES[self.usage.task].generates_text else "text"  # a written answer is the text

    def __iter__(self) -> Iterator[InputRow]:
        if self.path is None:
            yield from self._of_lines()
        elif self.path.suffix.lower() in tables.READERS and not self.path.is_dir():
            yield from self._of_table()
        else:
            paths = images_in(self.path) if self.path.is_dir() else [self.path]
            self.num_rows = len(paths)
            root = self.path if self.path.is_dir() else self.path.parent
            for path in paths:
                shown = str(path.relative_to(root))
                yield InputRow(shown, {self.main_column: shown}, path)

    def reference(self, columns: Mapping[str, Any]) -> Any:
        """What the row itself says is right: a label, several, a number, tags or a text; None where it says nothing.

        DataError where it says something that cannot be read.
        """
        if self.reads_images and self.path is not None and not self._columns:
            folder = Path(str(columns.get(self.main_column, ""))).parent.parts
            return next((name for name in reversed(folder) if name in self.usage.labels), None)
        if self.has_pairs:
            return True
        answer = self.format.answer
        cell = columns.get(self._columns.get(answer, ""))
        if not answer or cell is None or (isinstance(cell, str) and not cell.strip()):
            return None
        if self.reads_images:
            return str(cell).strip()
        try:
            fields = {role: columns.get(name) for role, name in self._columns.items()}
            if self._has_decimal_commas:
                fields[answer] = with_decimal_point(cell)
            example = self.format.to_example(fields)
            return _reference_of(example, USES[self.usage.task].metric_task)
        except ValueError as error:  # a word where a number is expected
            raise DataError(str(error)) from error

    def name_columns(self, message: str) -> str:
        """What is wrong with a row, with the user's column for the role."""
        return name_columns(message, self._columns)

    @property
    def has_references(self) -> bool:
        """Whether rows may say what is right."""
        return (self.reads_images and self.path is not None and self.path.is_dir()) or (
            self.format.answer in self._columns or self.has_pairs
        )

    @property
    def has_pairs(self) -> bool:
        """Whether rows have a chosen and a rejected answer, for a reward adapter."""
        return scores_answers(self.usage) and all(role in self._columns for role in PAIR)

    @property
    def _trained(self) -> dict[str, str]:
        """Role -> column of the training data."""
        if scores_answers(self.usage):
            return answer_columns(self.usage)
        return {} if self.usage.text is None else dict(self.usage.text.columns)

    # ---- lines and tables --------------------------------------------------------------------------------------

    def _of_lines(self) -> Iterator[InputRow]:
        empty: list[InputRow] = []
        for number, line in enumerate(self.lines, start=1):
            text = line.rstrip("\r\n")
            problem = "" if text.strip() else EMPTY
            if any("\udc80" <= char <= "\udcff" for char in text):  # how a stream marks bytes that it cannot decode
                text, problem = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), NOT_UTF8
            row = InputRow(f"{self.name} line {number}", {self.main_column: text}, text, problem)
            if problem == EMPTY:  # at the end they are no inputs
                empty.append(row)
                continue
            yield from empty
            empty.clear()
            yield row

    def _of_table(self) -> Iterator[InputRow]:
        assert self.path is not None, "a table is a file"
        suffix, noun = self.path.suffix.lower(), tables.ROW_NOUNS.get(self.path.suffix.lower(), "line")
        messages: list[str] = []
        good = (
            iter(tables.read_rows(self.path, messages)) if suffix == ".json" else tables.iter_rows(self.path, messages)
        )
        head = list(islice(good, HEAD_ROWS))
        if not head and not messages:
            raise DataError(f"{self.path} has no rows")
        self._find_columns([cells for _, cells in head])
        line = 1 if suffix in (".csv", ".tsv") else 0  # the last one that was read
        for number, cells in chain(head, good):
            if suffix == ".txt":
                for empty in range(line + 1, number):
                    yield InputRow(f"{self.path.name} line {empty}", {}, problem=EMPTY)
            line = number
            while messages:
                yield InputRow("", {}, problem=messages.pop(0))
            place = f"{self.path.name} {noun} {number}"
            columns = {str(name): cell for name, cell in cells.items()}
            if suffix == ".txt":
                columns, value = {self.main_column: columns["text"]}, columns["text"]
                yield InputRow(place, columns, value)
                continue
            try:
                yield InputRow(place, columns, self._value(columns))
            except DataError as error:
                yield InputRow(place, columns, problem=str(error))
        for message in messages:
            yield InputRow("", {}, problem=message)

    def _value(self, columns: Mapping[str, Any]) -> Any:
        roles = {role: column for role, column in self._columns.items() if role != self.format.answer}
        cells = {role: nan_to_none(columns.get(column)) for role, column in roles.items()}
        main = cells.get(self.main_role)
        if self.reads_images:
            if isinstance(main, bytes):
                return main
            if not isinstance(main, str) or not main.strip():
                raise DataError(f"{roles[self.main_role]!r} is {_shown(main)}, expected the path of an image")
            assert self.path is not None, "a table is a file"
            return self.path.parent / main
        if isinstance(main, str) and not main.lstrip().startswith("["):  # else a list as JSON
            if self.format.name in ("messages", "sharegpt") and main.strip():
                return main  # one question
            if self.format.name == "tokens":
                cells[self.main_role] = main.split()
        trained = self._trained
        return {trained.get(role, role): cell for role, cell in cells.items()}

    def _find_columns(self, head: Sequence[Mapping[str, Any]]) -> None:
        """Fills in the column of each role. DataError says which columns there are and what to write."""
        present = list(dict.fromkeys(str(name) for cells in head for name in cells))
        self._present, trained = present, self._trained
        roles = self.format.roles
        is_scored = scores_answers(self.usage)
        own_roles = {*self.format.required, "prompt"} if is_scored else {self.main_role}
        given: dict[str, str] = {}
        errors = Errors(DataError, self.name)
        for role, column in self.column_names.items():
            role = role if role in roles else self.main_role if role in ("", "text", "image", "input") else role
            if role not in roles:
                errors.add(f"--column {role}={column}: {suggest(role, list(roles), 20)}")
            elif column not in present:
                errors.add(f"there is no column {column!r} (--column {role}={column}); {suggest(column, present, 20)}")
            given[role] = column
        errors.raise_if_any()
        self._columns = {}
        for role, usual in roles.items():
            if role == self.format.answer and role not in given:
                continue
            generic = TEXT_COLUMNS if role == self.main_role and not (self.reads_images or is_scored) else ()
            wanted = [given[role]] if role in given else [trained.get(role), role, *usual, *generic]
            if role not in (*given, *trained, *own_roles) and (trained or is_scored):
                continue  # it was not trained with it
            taken = set(self._columns.values())
            found = next((c for w in wanted if w is not None for c in present if c == w and c not in taken), None)
            found = found or next(
                (c for w in wanted if w is not None for c in present if c.lower() == w.lower() and c not in taken), None
            )
            if found is not None:
                self._columns[role] = found
        if self.main_role not in self._columns and len(present) == 1:
            self._columns[self.main_role] = present[0]
        if self.format.answer and self.format.answer not in self._columns:
            wanted = [trained.get(self.format.answer), *([] if trained else [self.format.answer])]
            usual = self.format.roles[self.format.answer] if self.reads_images else ()
            found = next((w for w in (*wanted, *usual) if w in present and w not in self._columns.values()), None)
            if found is not None:
                self._columns[self.format.answer] = found
        if self.format.name == "label":  # as `detect` reads them in training
            column = self._columns.get("label", "")
            self._has_decimal_commas = are_decimal_commas([cells.get(column) for cells in head])
        self._check_columns(present, trained, head)

    def _check_columns(
        self, present: Sequence[str], trained: Mapping[str, str], head: Sequence[Mapping[str, Any]]
    ) -> None:
        required = [self.main_role, *[role for role in ("second",) if role in trained]]
        missing = [role for role in required if role not in self._columns]
        if missing:
            shown = ", ".join(name[:80] for name in present[:20]) + (", ..." if len(present) > 20 else "")
            in_training = f" ({trained[missing[0]]!r} in training)" if missing[0] in trained else ""
            raise DataError(
                f"{self.name} has the columns {shown}; which one holds the {missing[0]}{in_training} is not clear: "
                f"name it, --column {missing[0]}={_likely_column(present, head)}"
            )
        for role, column in self._columns.items():
            is_named = role in self.column_names or (self.path is not None and self.path.suffix.lower() == ".txt")
            if role in trained and trained[role] != column and not is_named:
                self.notes.append(f"{role} is read from the column {column!r} ({trained[role]!r} in training)")
        for role, column in trained.items():
            if role != self.format.answer and role not in self._columns and role in self.format.roles:
                self.notes.append(f"there is no column {column!r} ({role}), which the adapter was trained with")


def images_in(folder: Path) -> list[Path]:
    """The images of a folder and of the folders in it, sorted."""
    from kitout.data.read.image_folders import list_images  # images need pillow

    return list_images(folder, "**/*")


def _likely_column(present: Sequence[str], head: Sequence[Mapping[str, Any]]) -> str:
    """The one with the longest texts."""

    def length(column: str) -> int:
        return sum(len(cell) for cells in head if isinstance(cell := cells.get(column), str))

    return max(present, key=length, default="COLUMN")


def _reference_of(example: Example, metric_task: str) -> Any:
    if metric_task == "regression":
        value = float(getattr(example, "label"))  # noqa: B009 - of a labeled text
        return value if math.isfinite(value) else None
    if metric_task == "multilabel":
        label = getattr(example, "label")  # noqa: B009
        return list(label) if isinstance(label, tuple) else [example.answer_text()]
    if metric_task == "tokens":
        return list(getattr(example, "tags"))  # noqa: B009
    return example.answer_text()


def _shown(value: Any) -> str:
    return "empty" if value is None or value == "" else short_repr(value, 60)
