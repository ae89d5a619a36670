"""One example as text, whatever file it came from: a chat, a prompt with its completion, plain text, a text with a
label, words with tags; and an image with a label.

Every kind has the same two sides, the input (`source_text`) and the answer (`answer_text`), so splits, metrics and
sequence-to-sequence models need not know the kinds. It knows no file, no tokenizer and no model.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeAlias

from kitout.data.normalize import normalize_text
from kitout.errors import DataError

Label: TypeAlias = "str | int | float | tuple[str, ...]"  # a class, a number, or the labels that apply


@dataclass(frozen=True, kw_only=True)
class Example(ABC):
    """What all kinds have in common: two sides as text, and keys that say which examples are the same."""

    location: str = field(default="", compare=False)
    """Where it was read, for messages: "train.jsonl:12"."""
    source_index: int = field(default=0, compare=False)
    """Which source of a mixture it came from."""
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """What was changed or assumed when it was read, for the pre-flight: one phrase each."""
    group: str = field(default="", compare=False)
    """The same for examples that are about one thing and so not independent; empty: it stands for itself."""

    @abstractmethod
    def source_text(self) -> str:
        """The input as one text."""

    @abstractmethod
    def answer_text(self) -> str:
        """The answer as one text; empty for plain text."""

    @cached_property
    def exact_key(self) -> str:
        """The same for the same content, wherever and whenever it was read: by it exact copies are found."""
        return _hash(json.dumps(self.key_content(), sort_keys=True, default=_to_json_value, ensure_ascii=False))

    @cached_property
    def input_key(self) -> str:
        """The same for inputs that differ only in case, width of letters and white space."""
        return _hash(normalize_text(self.source_text()))

    def key_content(self) -> list[Any]:
        """Its kind, and the values that decide whether two examples are the same."""
        return [type(self).__name__, {f.name: getattr(self, f.name) for f in fields(self) if f.compare}]


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    message: Mapping[str, Any]
    """As a chat template takes it: role, content, perhaps tool_calls, name, ..."""
    train_on: bool | None = None
    """Whether the data flag it as trained on; None without a flag."""

    @property
    def role(self) -> str:
        return str(self.message["role"])

    @property
    def text(self) -> str:
        """The content, then the tool calls as JSON."""
        calls = [json.dumps(call.get("function", call), default=str) for call in self.message.get("tool_calls") or ()]
        return "\n".join(filter(None, [str(self.message.get("content") or ""), *calls]))


@dataclass(frozen=True)
class Chat(Example):
    """A conversation."""

    turns: tuple[Turn, ...]
    """In order."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Their JSON schemas, as chat templates take them."""

    def source_text(self) -> str:
        """All before the last assistant turn; with roles if that is more than one turn besides the system prompt."""
        return turns_text(self.turns[: self.last_answer_index()])

    def answer_text(self) -> str:
        return self.turns[self.last_answer_index()].text if self.last_answer_index() < len(self.turns) else ""

    def with_system(self, text: str) -> Chat:
        """With a system turn, unless there is one that says something."""
        has_system = self.turns[0].role == "system"
        if has_system and self.turns[0].text.strip():
            return self
        return replace(self, turns=(Turn({"role": "system", "content": text}), *self.turns[has_system:]))

    def last_answer_index(self) -> int:
        """Of the last assistant turn; the number of turns if there is none."""
        return max((i for i, turn in enumerate(self.turns) if turn.role == "assistant"), default=len(self.turns))


@dataclass(frozen=True)
class Completion(Example):
    """Raw text and its continuation, character by character, without a chat template."""

    prompt: str
    """Perhaps empty."""
    completion: str
    """What is trained on."""

    def source_text(self) -> str:
        return self.prompt

    def answer_text(self) -> str:
        return self.completion


@dataclass(frozen=True)
class Text(Example):
    """Plain text, trained on as a whole."""

    text: str
    """White space included."""

    def source_text(self) -> str:
        return self.text

    def answer_text(self) -> str:
        return ""


@dataclass(frozen=True)
class LabeledText(Example):
    """A text, or a pair of texts, and its class, number or set of labels."""

    text: str
    """The text, or the first of a pair."""
    label: Label
    """A class, a number, or all labels that apply."""
    text_pair: str | None = None
    """The second text of a pair."""

    def source_text(self) -> str:
        return self.text if self.text_pair is None else f"{self.text}\n{self.text_pair}"

    def answer_text(self) -> str:
        return ", ".join(self.label) if isinstance(self.label, tuple) else cell_to_text(self.label)


@dataclass(frozen=True)
class TaggedWords(Example):
    """Words and one tag each."""

    words: tuple[str, ...]
    """In order."""
    tags: tuple[str, ...]
    """One per word."""
    text: str = field(default="", compare=False)
    """The text that the words are of; empty where the data have words alone."""
    starts: tuple[int, ...] = field(default=(), compare=False)
    """The character of `text` at which each word begins."""

    def source_text(self) -> str:
        return " ".join(self.words)

    def located_words(self) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text as a model reads it, and the characters of each word; words alone are joined by single spaces."""
        starts = self.starts or tuple(accumulate((len(word) + 1 for word in self.words[:-1]), initial=0))
        spans = tuple((start, start + len(word)) for start, word in zip(starts, self.words, strict=True))
        return self.text or self.source_text(), spans

    def answer_text(self) -> str:
        return " ".join(self.tags)


@dataclass(frozen=True)
class LabeledImage(Example):
    """An image and its class. Two are the same here if their paths are; `ImageSet` compares pixels."""

    path: str
    """As the data write it: relative to the file it was read from, or absolute."""
    label: str
    """The class."""
    content: bytes = field(default=b"", compare=False, repr=False)
    """The image file itself, where a table holds it; then it has no path."""

    def source_text(self) -> str:
        return self.path

    def answer_text(self) -> str:
        return self.label


def turns_text(turns: Sequence[Turn]) -> str:
    """Turns as one text; with roles if there is more than one besides the system prompt."""
    num_turns = sum(t.role != "system" for t in turns)
    return "\n".join(t.text if t.role == "system" or num_turns == 1 else f"{t.role}: {t.text}" for t in turns)


def cell_to_text(value: object) -> str:
    """A value of a table as text: true and false as JSON writes them, whole floats without their .0."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        raise DataError(f"a cell holds {len(value):,} bytes that are no UTF-8 text: name the column that has the text")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _to_json_value(value: object) -> object:
    if isinstance(value, Turn):
        return [dict(value.message), value.train_on]
    if isinstance(value, Example):
        return value.key_content()
    return dict(value) if isinstance(value, Mapping) else str(value)
