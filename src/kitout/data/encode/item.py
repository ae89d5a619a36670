"""An example as a model takes it: token ids, which of them are trained on, and what is worth saying about it.

The encoders of this folder make it, `kitout.train` and `kitout.evaluate` read it. An item of alignment has two answers,
one answer that is wanted or not, or a prompt alone. Plain values, so that a set can be hashed, cached and counted. It
knows no tokenizer, no model and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

IGNORE_INDEX = -100  # the label of a token that is not trained on, as in torch's cross_entropy and transformers


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One encoded example."""

    input_ids: tuple[int, ...]
    """What the model reads, without padding."""
    labels: tuple[int, ...] = ()
    """One per id, not shifted: the id itself where a causal model is trained on it, or a token's class; else
    IGNORE_INDEX."""
    target_ids: tuple[int, ...] = ()
    """What a sequence-to-sequence model writes, its end token included."""
    label: int | float | tuple[float, ...] | None = None
    """The class of a sequence, a regression value, or a 0/1 vector."""
    prompt_length: int = 0
    """Causal: an answer is generated from `input_ids[:prompt_length]`, all before the last trained turn."""
    reference: str = ""
    """The answer as text."""
    num_truncated: int = 0
    """Tokens that truncation took."""
    num_truncated_targets: int = 0
    """Those of them that were to be trained on."""
    location: str = ""
    """Where it was read, for messages."""
    remarks: tuple[str, ...] = ()
    """What of the example the model does not see or is not trained on as the data have it: one phrase each."""
    group: str = ""
    """As in `Example`."""

    @property
    def length(self) -> int:
        """Tokens a model works through."""
        return len(self.input_ids) + len(self.target_ids)

    @property
    def num_targets(self) -> int:
        """Tokens the loss is taken over; 1 for a sequence's value."""
        if self.label is not None:
            return 1
        return sum(label != IGNORE_INDEX for label in self.labels) + len(self.target_ids)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Two answers to one prompt: two rows of a batch, chosen before rejected."""

    chosen: EncodedExample
    """The prompt with the preferred answer."""
    rejected: EncodedExample
    """The same prompt, truncated alike, with the other answer."""
    margin: float = 0.0
    """By how much the chosen answer is better; 0: not known."""

    @property
    def rows(self) -> tuple[EncodedExample, ...]:
        """What a model reads."""
        return self.chosen, self.rejected

    @property
    def length(self) -> int:
        """Tokens a model works through, of both."""
        return self.chosen.length + self.rejected.length

    @property
    def num_targets(self) -> int:
        """Tokens of both answers."""
        return self.chosen.num_targets + self.rejected.num_targets

    @property
    def location(self) -> str:
        return self.chosen.location

    @property
    def group(self) -> str:
        return self.chosen.group

    @property
    def remarks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.chosen.remarks + self.rejected.remarks))


@dataclass(frozen=True, slots=True)
class EncodedUnpaired:
    """One answer to a prompt."""

    answer: EncodedExample
    """The prompt with the answer."""
    is_desirable: bool
    """Whether the answer is wanted."""

    @property
    def rows(self) -> tuple[EncodedExample, ...]:
        """What a model reads."""
        return (self.answer,)

    @property
    def length(self) -> int:
        """Tokens a model works through."""
        return self.answer.length

    @property
    def num_targets(self) -> int:
        """Tokens of the answer."""
        return self.answer.num_targets

    @property
    def location(self) -> str:
        return self.answer.location

    @property
    def group(self) -> str:
        return self.answer.group

    @property
    def remarks(self) -> tuple[str, ...]:
        return self.answer.remarks


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt whose answers a model writes."""

    input_ids: tuple[int, ...]
    """What the model reads, without padding; of a chat with the template's generation prompt."""
    prompt: str | tuple[dict[str, Any], ...]
    """As the data have it, for reward functions: a text, or messages."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """All columns as they were read, for reward functions."""
    location: str = ""
    """Where it was read, for messages."""
    num_truncated: int = 0
    """Tokens that truncation took from its front."""
    remarks: tuple[str, ...] = ()
    """What is worth saying about it: one phrase each."""
    group: str = ""
    """As in `Example`."""

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """0: what is trained on is not written yet."""
        return 0


@dataclass(frozen=True, slots=True)
class EncodedAnswers:
    """One answer, or two to the same prompt, for a reward model to score."""

    rows: tuple[EncodedExample, ...]
    """Prompt and answer as tokens, the end token included."""

    @property
    def num_truncated(self) -> int:
        """Tokens of the prompt that are cut off."""
        return max(row.num_truncated for row in self.rows)


AnyItem: TypeAlias = EncodedExample | EncodedPair | EncodedUnpaired | EncodedPrompt


def without_first_target(labels: tuple[int, ...]) -> tuple[int, ...]:
    """Labels of a causal row whose first token is no target: nothing predicts it."""
    return labels if labels[:1] in ((), (IGNORE_INDEX,)) else (IGNORE_INDEX, *labels[1:])


def digest(items: Iterable[AnyItem]) -> str:
    """A fingerprint of the items in their order; where they were read, remarks and groups do not count."""
    sha256 = hashlib.sha256()
    for item in items:
        sha256.update(repr(_content(item)).encode())
    return sha256.hexdigest()


def _content(item: AnyItem) -> tuple[Any, ...]:
    if isinstance(item, EncodedPair):
        return "pair", *map(_content, item.rows), item.margin
    if isinstance(item, EncodedUnpaired):
        return "unpaired", _content(item.answer), item.is_desirable
    if isinstance(item, EncodedPrompt):
        row = sorted((str(name), repr(value)) for name, value in item.row.items())
        return "prompt", item.input_ids, item.prompt, row, item.num_truncated
    return (
        item.input_ids, item.labels, item.target_ids, item.label, item.prompt_length, item.reference,
        item.num_truncated, item.num_truncated_targets,
    )  # fmt: skip
