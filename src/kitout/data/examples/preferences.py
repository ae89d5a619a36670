"""Examples that say which answers are wanted: pairs, single answers, and prompts whose answers are yet to be written.

Each side is a chat or a raw completion as other examples are, and holds its prompt; splits compare them by that
prompt. An answer is the last assistant turn, or all turns from the first one that is flagged as trained on. It knows
no file, no tokenizer and no loss. The kinds are those of TRL's data formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kitout.data.examples.examples import Chat, Completion, Example, Turn, turns_text

Answered: TypeAlias = "Chat | Completion"  # a prompt with its answer


@dataclass(frozen=True)
class PreferencePair(Example):
    """Two answers to one prompt, of which one is preferred."""

    chosen: Answered
    """The prompt with the preferred answer."""
    rejected: Answered
    """The same prompt with the other answer."""
    margin: float = 0.0
    """By how much the chosen answer is better, in units of a reward; 0: not known."""

    def source_text(self) -> str:
        return prompt_text(self.chosen)

    def answer_text(self) -> str:
        return answer_part(self.chosen)


@dataclass(frozen=True)
class UnpairedAnswer(Example):
    """A prompt with one answer, and whether that answer is wanted."""

    answer: Answered
    """The prompt with the answer."""
    is_desirable: bool
    """Whether the answer is wanted."""

    def source_text(self) -> str:
        return prompt_text(self.answer)

    def answer_text(self) -> str:
        return answer_part(self.answer)


@dataclass(frozen=True)
class Prompt(Example):
    """A prompt whose answers a model writes and a reward judges."""

    prompt: Chat | str
    """A chat without its answer, or raw text."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """All columns as they were read, for reward functions."""
    is_text: bool = field(default=False, compare=False)
    """Whether the data have the prompt as a text: then it is the last turn of the chat."""

    def source_text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else turns_text(self.prompt.turns)

    def answer_text(self) -> str:
        return ""


PREFERENCE_KINDS = (PreferencePair, UnpairedAnswer, Prompt)  # what alignment reads and `kitout train` does not


def is_chat(example: Example) -> bool:
    """Whether the chat template writes it."""
    if isinstance(example, PreferencePair):
        return isinstance(example.chosen, Chat)
    if isinstance(example, UnpairedAnswer):
        return isinstance(example.answer, Chat)
    return isinstance(example.prompt if isinstance(example, Prompt) else example, Chat)


def answer_start(chat: Chat) -> int:
    """The turn with which the answer begins."""
    flagged = (i for i, turn in enumerate(chat.turns) if turn.train_on)
    return next(flagged, chat.last_answer_index())


def prompt_text(example: Answered) -> str:
    """All before the answer as one text."""
    return example.prompt if isinstance(example, Completion) else turns_text(example.turns[: answer_start(example)])


def answer_part(example: Answered) -> str:
    """The answer as one text."""
    return example.completion if isinstance(example, Completion) else turns_text(answer_turns(example))


def answer_turns(chat: Chat) -> tuple[Turn, ...]:
    """The turns of the answer: one, or several where tools are called."""
    return chat.turns[answer_start(chat) :]


def unpair(pairs: Iterable[PreferencePair]) -> list[UnpairedAnswer]:
    """Each pair as two answers, the chosen one wanted and the rejected one not; as TRL does for KTO."""
    return [
        UnpairedAnswer(side, is_desirable, location=pair.location, source_index=pair.source_index, group=pair.group)
        for pair in pairs
        for side, is_desirable in ((pair.chosen, True), (pair.rejected, False))
    ]
