"""One example in the words it is learnt from, whatever file it came from: a chat, a prompt with its continuation, a
text, a text with a label, words with tags; and a picture with a label.

Every kind answers the same two questions, what is given (`source_text`) and what is to be said (`answer_text`), so that
parts, metrics and sequence-to-sequence models need not know the kinds. It knows no file, no tokenizer and no model.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeAlias

from kitout.data.normalize import normalize_text

Label: TypeAlias = "str | int | float | tuple[str, ...]"  # a class, a number, or the labels that apply


@dataclass(frozen=True, kw_only=True)
class Example(ABC):
    """What all kinds have besides their content."""

    location: str = field(default="", compare=False)
    """Where it was read, for messages: "train.jsonl line 12"."""
    source_index: int = field(default=0, compare=False)
    """Which source of a mixture it came from."""

    @abstractmethod
    def source_text(self) -> str:
        """What is given, as one text."""

    @abstractmethod
    def answer_text(self) -> str:
        """What is to be said about it; empty for plain text."""

    @cached_property
    def exact_key(self) -> str:
        """The same for the same content, wherever it was read and whenever."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return _hash(
            json.dumps([type(self).__name__, values], sort_keys=True, default=_to_json_value, ensure_ascii=False)
        )

    @cached_property
    def input_key(self) -> str:
        """The same for inputs that only case, width of letters and white space tell apart."""
        return _hash(normalize_text(self.source_text()))

    @cached_property
    def content_key(self) -> str:
        """The same for examples that say the same about the same, by the same measure as `input_key`."""
        return _hash(f"{self.input_key} {normalize_text(self.answer_text())}")


@dataclass(frozen=True)
class Turn:
    """message: as a chat template takes it (role, content, perhaps tool_calls, name, ...).

    learn: what the data says of this turn; None where it says nothing.
    """

    message: Mapping[str, Any]
    train_on: bool | None = None

    @property
    def role(self) -> str:
        return str(self.message["role"])

    @property
    def text(self) -> str:
        """The content, and the calls of tools as JSON."""
        calls = [json.dumps(call.get("function", call)) for call in self.message.get("tool_calls") or ()]
        return "\n".join([part for part in (str(self.message.get("content") or ""), *calls) if part])


@dataclass(frozen=True)
class Chat(Example):
    """Turns in order; tools: their JSON schemas, as chat templates take them."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def source_text(self) -> str:
        """All before the last assistant turn; who speaks is written where more than one exchange is held."""
        before = self.turns[: self._last_answer_index()]
        said = [t for t in before if t.role != "system"]
        lines = [t.text if t.role == "system" or len(said) == 1 else f"{t.role}: {t.text}" for t in before]
        return "\n".join(lines)

    def answer_text(self) -> str:
        return self.turns[self._last_answer_index()].text if self._last_answer_index() < len(self.turns) else ""

    def _last_answer_index(self) -> int:
        return max((i for i, turn in enumerate(self.turns) if turn.role == "assistant"), default=len(self.turns))


@dataclass(frozen=True)
class Completion(Example):
    """Raw text and how it goes on, character by character: no template comes in between."""

    prompt: str
    completion: str

    def source_text(self) -> str:
        return self.prompt

    def answer_text(self) -> str:
        return self.completion


@dataclass(frozen=True)
class Text(Example):
    """Text to go on writing like."""

    text: str

    def source_text(self) -> str:
        return self.text

    def answer_text(self) -> str:
        return ""


@dataclass(frozen=True)
class LabeledText(Example):
    """A text, or two that belong together, and its class, number or set of labels."""

    text: str
    label: Label
    text_pair: str | None = None

    def source_text(self) -> str:
        return self.text if self.text_pair is None else f"{self.text}\n{self.text_pair}"

    def answer_text(self) -> str:
        return ", ".join(self.label) if isinstance(self.label, tuple) else cell_to_text(self.label)


@dataclass(frozen=True)
class TaggedWords(Example):
    """Words and one tag each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]

    def source_text(self) -> str:
        return " ".join(self.words)

    def answer_text(self) -> str:
        return " ".join(self.tags)


@dataclass(frozen=True)
class LabeledImage(Example):
    """An image file and its class. Who opens it compares pixels; here two are the same if their paths are."""

    path: str
    """As the data write it: relative to the file it was read from, or absolute."""
    label: str

    def source_text(self) -> str:
        return self.path

    def answer_text(self) -> str:
        return self.label


def cell_to_text(value: object) -> str:
    """A value of a table as text: true and false as JSON writes them, whole floats without their .0."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _to_json_value(value: object) -> object:
    if isinstance(value, Turn):
        return [dict(value.message), value.train_on]
    return dict(value) if isinstance(value, Mapping) else str(value)
