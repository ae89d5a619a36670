"""Inputs of a text task as a model takes them: what a user writes -> an example of the trained format -> token ids.

A string stands for the main column of the format, a mapping for a row with the training columns, a pair for two texts.
The encoders are those of training; where they need an answer, one is made up that changes nothing of the input. It
knows records and tokenizers, no file and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from kitout.data.encode.classification import TokenClassEncoder
from kitout.data.encode.generation import encode_each
from kitout.data.encode.item import EncodedExample
from kitout.data.encode.languages import Languages
from kitout.data.encode.prompts import PromptEncoder
from kitout.data.encode.spans_to_labels import SpanTokenizer
from kitout.data.examples.examples import Chat, Completion, Example, TaggedWords, Text, Turn
from kitout.data.examples.format_table import FORMATS, Format
from kitout.data.examples.system_prompt import with_system_prompt
from kitout.data.read.json_text import parse_json
from kitout.data.read.tables import DataError, add_first
from kitout.errors import BadRows, Errors, suggest
from kitout.evaluate.metrics.entities import entity_spans
from kitout.files.usage_record import TextRecord, UsageRecord
from kitout.format import short_repr
from kitout.train.objectives.tasks import USES, EncoderSettings, Task

ANSWER = "x"  # of examples that are read without one; it is never part of an input
DEFAULT_FORMATS = {"tokens": "tokens", "generation": "instruction"}  # by the task of the metrics; else labels


class TextInputs:
    """`inputs(values)` -> one encoded example each. languages: of a sequence-to-sequence tokenizer that has them."""

    def __init__(self, task: Task, usage: UsageRecord, tokenizer: Any, languages: Languages | None = None) -> None:
        assert usage.text is not None, "of texts"
        self.task, self.usage, self.record, self.tokenizer = task, usage, usage.text, tokenizer
        self.prompts = PromptEncoder(tokenizer, self.record.chat_template_kwargs) if task.packable else None
        assert task.build_encoder is not None, "of texts"
        self.encode = task.build_encoder(
            EncoderSettings(
                tokenizer, self.record.max_length, tuple(usage.labels),
                chat_template_kwargs=self.record.chat_template_kwargs, languages=languages,
            )
        )  # fmt: skip

    @property
    def format(self) -> Format:
        """The format of the training examples, or the usual one of the task."""
        return format_of(self.usage)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Token ids that training keeps at the front of a text that is too long."""
        return frozenset(SpanTokenizer(self.tokenizer).special_tokens)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The token that the chat template writes after a turn: it is trained on, whatever the tokenizer's end is."""
        return () if self.prompts is None else self.prompts.turn_end_ids

    def __call__(self, values: Sequence[Any], num_after: int = 0) -> list[EncodedExample]:
        """Encoded, in order. num_after: tokens behind a prompt that count with it. BadRows names every bad value."""
        refused: dict[int, str] = {}
        examples: list[Example] = []
        for index, value in enumerate(values):
            try:
                examples.append(self.to_example(value, index + 1))
            except DataError as error:
                refused[index] = str(error)
        raise_bad_inputs(refused)
        if self.prompts is None:
            return self.encode(examples)
        room = self.record.max_length - max(1, num_after)
        items = []
        for ids, example in zip(self._prompts(examples), examples, strict=True):
            kept = cut_front(ids, room, self.special_ids)
            items.append(EncodedExample(kept, num_truncated=len(ids) - len(kept), location=example.location))
        return items

    def encode_chat(self, chat: Chat) -> tuple[int, ...]:
        """All turns as a prompt. DataError for a chat that ends with an answer."""
        if self.prompts is not None:
            return self.prompts.encode_chat(chat)
        if chat.turns[-1].role == "assistant":
            raise DataError("the chat ends with an assistant turn: end it with what is to be answered")
        (item,) = self.encode([replace(chat, turns=(*chat.turns, Turn({"role": "assistant", "content": ANSWER})))])
        return item.input_ids

    def encode_raw(self, text: str) -> tuple[int, ...]:
        """Raw text, with the tokenizer's own special tokens."""
        return tuple(self.tokenizer(text)["input_ids"]) if self.prompts is None else self.prompts.encode_text(text)

    def to_example(self, value: Any, number: int = 1) -> Example:
        """One input as an example of the trained format."""
        try:
            example = self.format.to_example(self._with_answer(self._row_fields(value)))
            if self.record.system_prompt:
                example = with_system_prompt(example, self.record.system_prompt)
        except DataError as error:
            raise DataError(f"input {number}: {error}") from error
        if isinstance(example, TaggedWords) and self.usage.labels:  # a set of tags may be without O
            example = replace(example, tags=(self.usage.labels[0],) * len(example.words))
        return replace(example, location=f"input {number}")

    def tagged(self, example: Example, classes: Sequence[int]) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
        """The words of an example and the tag of each. classes: of every token."""
        assert isinstance(example, TaggedWords), "of a token classifier"
        assert isinstance(self.encode, TokenClassEncoder), "of a token classifier"
        tokens = self.encode.first_tokens(example)
        tags = [self.usage.labels[classes[tokens[i]]] if i in tokens else None for i in range(len(example.words))]
        return example.words, tuple(tags)

    def spans(self, example: Example, tags: Sequence[str | None]) -> tuple[dict[str, Any], ...] | None:
        """The entities that the tags make, in characters of the text; None where training had words and tags."""
        if self.format.name != "spans" or not isinstance(example, TaggedWords):
            return None
        text, words = example.located_words()
        entities = sorted(entity_spans([tag or "O" for tag in tags]), key=lambda entity: entity[1])
        places = [(words[first][0], words[last][1], label) for label, first, last in entities]
        return tuple({"start": a, "end": b, "label": label, "text": text[a:b]} for a, b, label in places)

    def _prompts(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Of a causal model: all before the answer."""
        assert self.prompts is not None
        prompts = self.prompts

        def encode(example: Example) -> tuple[int, ...]:
            if isinstance(example, Chat):
                return prompts.encode_chat(replace(example, turns=example.turns[: _last_answer(example)]))
            if isinstance(example, Completion | Text):
                return prompts.encode_text(example.source_text())
            raise DataError("a labeled text is no prompt: give the instruction that the model was trained with")

        return encode_each(examples, encode)

    def _row_fields(self, value: Any) -> dict[str, Any]:
        """The roles of the format that a value has."""
        main, *others = [role for role in self.format.roles if role != self.format.answer]
        if isinstance(value, Mapping):
            return self._fields_of_mapping(value)
        if isinstance(value, tuple):
            if len(value) != 2 or "second" not in others:
                raise DataError(f"a tuple is a pair of texts for a model that compares two, found {short_repr(value)}")
            return {main: value[0], "second": value[1]}
        if not isinstance(value, str):
            raise DataError(
                f"found {short_repr(value)}, expected text, or a mapping with the columns {self._columns()}"
            )
        if self.format.name in ("messages", "sharegpt"):
            return {main: [{"role": "user", "content": value}]}
        return {main: value.split() if self.format.name == "tokens" else value}

    def _fields_of_mapping(self, value: Mapping[str, Any]) -> dict[str, Any]:
        columns = {role: self.record.columns.get(role) for role in self.format.roles}
        fields: dict[str, Any] = {}
        for role, usual in self.format.roles.items():
            names = [columns[role]] if columns[role] is not None else [role, *usual]
            found = next((name for name in names if name in value), None)
            if found is not None and role != self.format.answer:
                fields[role] = value[found]
        pairs = [role for role in ("second",) if role in self.record.columns]  # trained on two texts
        missing = [r for r in (*self.format.required, *pairs) if r != self.format.answer and r not in fields]
        if missing:
            names = [str(key) for key in value]
            wanted = [columns[role] or role for role in missing]
            raise DataError(
                f"it has no {' and no '.join(map(repr, wanted))}; {suggest(wanted[0], names)} The columns are "
                f"{self._columns()}"
            )
        return fields

    def _columns(self) -> str:
        roles = [role for role in self.format.roles if role != self.format.answer]
        return ", ".join(self.record.columns.get(role, role) for role in roles)

    def _with_answer(self, row_fields: dict[str, Any]) -> dict[str, Any]:
        """With an answer where the format requires one."""
        answers: dict[str, Any] = {"spans": [], "label": self.usage.labels[0] if self.usage.labels else 0.0}
        if self.format.name == "tokens":
            answers["tags"] = [self.usage.labels[0]] * len(row_fields["tokens"])
        if self.format.name == "question" and row_fields.get("choices") is not None:
            answers["answer"] = _first_choice(row_fields["choices"])
        if isinstance(row_fields.get("prompt"), list):
            answers["completion"] = [{"role": "assistant", "content": ANSWER}]
        for role in ("messages", "conversations"):
            turns = row_fields.get(role)
            if isinstance(turns, list) and turns and _speaker(turns[-1]) not in ("assistant", "gpt", "model", "bot"):
                row_fields = {**row_fields, role: [*turns, {"role": "assistant", "content": ANSWER}]}
        return row_fields | (
            {self.format.answer: answers.get(self.format.answer, ANSWER)} if self.format.answer else {}
        )


def raise_bad_inputs(refused: Mapping[int, str]) -> None:
    """BadRows with the first few messages, and all of them by index; nothing where there are none."""
    errors = Errors(BadRows, "these cannot be read")
    add_first(errors, list(refused.values()), "inputs")
    try:
        errors.raise_if_any()
    except BadRows as error:
        error.messages = refused
        raise


def format_of(usage: UsageRecord) -> Format:
    """The format of the training examples, or the usual one of the task."""
    trained = None if usage.text is None else usage.text.format
    return FORMATS[trained or DEFAULT_FORMATS.get(USES[usage.task].metric_task, "label")]


def cut_front(ids: Sequence[int], room: int, special_ids: frozenset[int]) -> tuple[int, ...]:
    """At most `room` tokens: the front goes, as in training, but for a special token that begins the text."""
    num_kept = 1 if ids and ids[0] in special_ids and room > 1 else 0
    return tuple(ids) if len(ids) <= room else (*ids[:num_kept], *ids[len(ids) - max(1, room) + num_kept :])


def _first_choice(choices: Any) -> Any:
    if isinstance(choices, str) and choices.lstrip().startswith("{"):
        choices = parse_json(choices)
    names = choices.get("label") if isinstance(choices, Mapping) else None
    return names[0] if isinstance(names, list) and names else 0


def _speaker(message: Any) -> str:
    return str(message.get("role", message.get("from", ""))) if isinstance(message, Mapping) else ""


def _last_answer(chat: Chat) -> int:
    return max((i for i, turn in enumerate(chat.turns) if turn.role == "assistant"), default=len(chat.turns))


def chat_of(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, record: TextRecord | None) -> Chat:
    """Messages as a user gives them, with the system prompt of the training examples where they have none."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    chat = FORMATS["messages"].to_example({"messages": list(messages), "tools": list(tools or ())})
    assert isinstance(chat, Chat)
    return chat.with_system(record.system_prompt) if record is not None and record.system_prompt else chat
