"""Inputs of a reward adapter: an answer to a prompt, or a chosen and a rejected one -> rows of tokens.

A mapping has `prompt` and `completion`, or `prompt`, `chosen` and `rejected` (texts, or messages), a tuple the first
two. They are read and encoded as the pairs of its training were. It knows records and tokenizers, no file and no model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kitout.data.encode.answers import AnswerRows, UnpairedEncoder
from kitout.data.encode.generation import encode_each
from kitout.data.encode.item import EncodedAnswers
from kitout.data.encode.languages import Languages
from kitout.data.encode.spans_to_labels import SpannedText
from kitout.data.examples.examples import Example
from kitout.data.examples.format_table import FORMATS, Format
from kitout.data.examples.preferences import PreferencePair, UnpairedAnswer
from kitout.data.examples.system_prompt import with_system_prompt
from kitout.data.read.tables import DataError
from kitout.errors import suggest
from kitout.files.usage_record import UsageRecord
from kitout.format import short_repr
from kitout.predict.text_inputs import TextInputs, raise_bad_inputs
from kitout.train.objectives.tasks import REWARD, Task

PAIR = ("chosen", "rejected")
RAW = "completion"  # the format by which a model is asked that was trained on raw text
WHAT_TO_GIVE = (
    "a reward adapter scores an answer to a prompt: give a table with the columns prompt and completion, or prompt, "
    'chosen and rejected (in Python: {"prompt": "...", "completion": "..."})'
)


class AnswerInputs(TextInputs):
    """`inputs(values)` -> the rows of one answer, or of two, for each value."""

    @property
    def rows(self) -> AnswerRows:
        """The encoder of its training."""
        assert isinstance(self.encode, UnpairedEncoder), "of a reward adapter"
        return self.encode.rows

    def __call__(self, values: Sequence[Any], num_after: int = 0) -> list[Any]:
        """Encoded, in order. BadRows names every bad value, and those whose answers do not fit."""
        refused: dict[int, str] = {}
        examples: list[Example] = []
        for index, value in enumerate(values):
            try:
                examples.append(self.to_example(value, index + 1))
            except DataError as error:
                refused[index] = str(error)
        raise_bad_inputs(refused)
        self.rows.dropped.clear()
        encoded = self.rows.encode(examples, encode_each(examples, self._to_spans))
        unfit = iter(list(self.rows.dropped))
        raise_bad_inputs({i: next(unfit) for i, rows in enumerate(encoded) if not rows})
        return [EncodedAnswers(tuple(rows)) for rows in encoded]

    def to_example(self, value: Any, number: int = 1) -> Example:
        """One input as an answer or a pair."""
        try:
            example = self._read(value)
            if self.record.system_prompt:
                example = with_system_prompt(example, self.record.system_prompt)
        except DataError as error:
            raise DataError(f"input {number}: {error}") from error
        return replace(example, location=f"input {number}")

    def _read(self, value: Any) -> Example:
        if isinstance(value, tuple) and len(value) == 2:
            value = dict(zip(("prompt", "completion"), value, strict=True))
        if not isinstance(value, Mapping):
            raise DataError(f"found {short_repr(value)}; {WHAT_TO_GIVE}")
        form, trained = answer_format(self.usage, value), answer_columns(self.usage)
        row_fields: dict[str, Any] = {}
        for role, usual in form.roles.items():
            found = next((name for name in (trained.get(role), role, *usual) if name in value), None)
            if found is not None and (role in (*form.required, "prompt", *trained)):
                row_fields[role] = value[found]
        missing = [role for role in form.required if role not in row_fields]
        if missing:
            raise DataError(f"it has no {missing[0]!r} ({suggest(missing[0], [*map(str, value)])}); {WHAT_TO_GIVE}")
        return form.to_example(row_fields)

    def _to_spans(self, example: Example) -> list[SpannedText]:
        if isinstance(example, PreferencePair):
            sides = [example.chosen, example.rejected]
        else:
            assert isinstance(example, UnpairedAnswer), "one answer"
            sides = [example.answer]
        return [self.rows.to_spans(replace(side, location=example.location)) for side in sides]


def text_inputs(task: Task, usage: UsageRecord, tokenizer: Any, languages: Languages | None = None) -> TextInputs:
    """The inputs of a text task."""
    return (AnswerInputs if scores_answers(usage) else TextInputs)(task, usage, tokenizer, languages)


def scores_answers(usage: UsageRecord) -> bool:
    """Whether it is a reward adapter's."""
    return usage.task == REWARD


def answer_format(usage: UsageRecord, names: Collection[str]) -> Format:
    """How a row is read: as a pair where it has both answers, else as one. names: its columns."""
    is_raw = usage.text is not None and usage.text.format == RAW
    pairs = FORMATS["raw_preference" if is_raw else "preference"]
    if all(any(name in names for name in (role, *pairs.required[role])) for role in PAIR):
        return replace(pairs, answer="")
    single = FORMATS["raw_unpaired" if is_raw else "unpaired"]
    required = {role: usual for role, usual in single.required.items() if role != "label"}
    return replace(
        single, required=required, answer="", to_example=lambda fields: single.to_example({**fields, "label": True})
    )


def answer_columns(usage: UsageRecord) -> dict[str, str]:
    """Role -> column of the pairs that it was trained on; their answers are named by the formats alone."""
    columns = {} if usage.text is None else usage.text.columns
    return {("prompt" if role == "instruction" else role): column for role, column in columns.items()}
