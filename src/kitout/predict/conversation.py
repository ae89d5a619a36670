"""A chat with one model and its adapters: who answers, what was said so far, and the commands that begin with a slash.

Every speaker (an adapter, or the base) has a history of its own from the moment two are compared; otherwise the
conversation goes on whoever answers. What was said can be written as examples that `kitout train` reads. It knows no
terminal: text comes in, and pieces of answers and notes go out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from kitout.errors import ConfigError, suggest
from kitout.files.atomic import write_text
from kitout.files.system_errors import as_path, as_path_error
from kitout.predict.answer_stream import AnswerStream, generation_options
from kitout.predict.predictor import DEFAULT_NEW_TOKENS, Predictor

BASE = "base"  # what the model without an adapter is called
COMMANDS = {
    "/use NAME": "who answers: an adapter, or base",
    "/compare A B": "several answer the same; /use ends it",
    "/system TEXT": "the system prompt; without a text: none",
    "/seed N": "of sampling; the same seed gives the same answers",
    "/temperature X": "0: the likeliest answer; /top_p, /top_k and /min_p alike",
    "/tokens N": "of an answer, at most",
    "/reset": "begin anew; the model forgets what was said",
    "/save FILE": "write what was said, as examples for kitout train",
    "/help": "this list and the settings",
    "/quit": "the end (Ctrl-D too)",
}
NUMBERS: dict[str, Callable[[str], Any]] = {"temperature": float, "top_p": float, "top_k": int, "min_p": float}
Message = dict[str, str]


@dataclass(frozen=True)
class Piece:
    """A part of what is shown."""

    speaker: str
    """Who says it; "" for a note of the program."""
    text: str
    """As the model wrote it: not safe for a terminal."""
    is_first: bool = False
    """It begins an answer."""


@dataclass
class Conversation:
    """`say(line)` -> pieces. It ends when `has_ended`."""

    predictor: Predictor
    """With language models only."""
    system: str = ""
    """The system prompt."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """temperature, top_p, ..."""
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    """Of an answer."""
    seed: int = 0
    """Of sampling."""
    has_ended: bool = False
    """Whether /quit was said."""
    speakers: list[str] = field(default_factory=list)
    """Who answers."""
    histories: dict[str, list[Message]] = field(default_factory=dict)
    """By speaker, without the system prompt."""
    finished: list[list[Message]] = field(default_factory=list)
    """Conversations before a /reset, or of those who answer no longer."""
    _num_answers: int = 0

    def __post_init__(self) -> None:
        generation_options(self.sampling)
        if not self.speakers:
            self.speakers = [self.names[0] if self.predictor.names else BASE]
        self.histories = {self.speakers[0]: []}

    @property
    def names(self) -> list[str]:
        """Who can answer."""
        return [*self.predictor.names, *([] if BASE in self.predictor.names else [BASE])]

    @property
    def remarks(self) -> list[str]:
        """What a person should know before the first line."""
        self._activate(self.speakers[0])
        usage = self.predictor.usage
        if self._is_raw:
            return [f"{self.speakers[0]} was trained on raw text: what you write is continued, one text at a time"]
        if not self._remembers:
            why = "reads one text" if self.predictor.kit.config.is_encoder_decoder else "has no chat template"
            return [f"the model {why}: each line is answered alone, without what was said before"]
        own = usage.text.system_prompt if usage.text is not None and not self.system else None
        return [f"system prompt of the training examples: {own}"] if own else []

    def say(self, line: str) -> Iterator[Piece]:
        """What comes of a line: a command, or a message that is answered. KitoutError for what cannot be done.

        Closing the iterator stops the answer. What it said until then stays in the conversation.
        """
        text = line.strip()
        if not text:
            return
        if text.startswith("/") and not text.startswith("//"):
            yield Piece("", self._obey(text))
            return
        message = text.removeprefix("/") if text.startswith("//") else text
        for speaker in list(self.speakers):
            yield from self._answer(speaker, message)
        self._num_answers += 1

    def examples(self) -> list[dict[str, Any]]:
        """What was said, one row for each conversation with an answer, as `kitout train` reads it."""
        chats = [*self.finished, *(self._with_system(chat, name) for name, chat in self.histories.items())]
        return [{"messages": chat} for chat in chats if any(turn["role"] == "assistant" for turn in chat)]

    def save(self, file: str, before: str = "") -> int:
        """Writes the examples, whole or not at all; how many. before: lines that the file had."""
        path, examples = as_path(file), self.examples()
        with as_path_error("written", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, before + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples))
        return len(examples)

    # ---- an answer ---------------------------------------------------------------------------------------------

    def _answer(self, speaker: str, message: str) -> Iterator[Piece]:
        history = self.histories[speaker]
        self._activate(speaker)
        if not self._remembers and history:
            self.finished.append(self._with_system(history, speaker))
            history = self.histories[speaker] = []
        asked: list[Message] = [*history, {"role": "user", "content": message}]
        options: dict[str, Any] = {**self.sampling, "max_new_tokens": self.max_new_tokens, "stream": True}
        if generation_options(self.sampling).get("do_sample"):
            options["seed"] = self.seed + self._num_answers
        stream: AnswerStream
        try:
            if self._is_raw:
                stream = self.predictor.generate(message, **options)
            else:
                stream = self.predictor.chat(self._with_system(asked, speaker), **options)
        except ConfigError as error:
            if not history:
                raise
            raise ConfigError(f"{error} (the line was not said; /reset begins anew)") from error
        said: list[str] = []
        try:
            with closing(stream):
                yield Piece(speaker, "", is_first=True)
                for text in stream:
                    said.append(text)
                    yield Piece(speaker, text)
        finally:  # Ctrl-C too
            if said:
                self.histories[speaker] = [*asked, {"role": "assistant", "content": "".join(said)}]
        if not stream.has_ended:
            yield Piece("", f"(the answer was cut after {stream.num_tokens} tokens: /tokens N allows more)")
        elif not said:
            yield Piece("", "(no answer: the model ended it at once)")

    def _activate(self, speaker: str) -> None:
        self.predictor.use(None if speaker == BASE and BASE not in self.predictor.names else speaker)

    @property
    def _is_raw(self) -> bool:
        """Whether the adapter in use continues text, and does not chat."""
        text = self.predictor.usage.text
        return text is not None and text.format in ("completion", "text")

    @property
    def _remembers(self) -> bool:
        return not (
            self.predictor.kit.config.is_encoder_decoder or self._is_raw or not self.predictor.tokenizer.chat_template
        )

    def _with_system(self, chat: Sequence[Message], speaker: str) -> list[Message]:
        """With the system prompt in force, else that of the speaker's training examples."""
        usage = self.predictor.usages.get(speaker)
        trained = usage.text.system_prompt if usage is not None and usage.text is not None else None
        system = self.system or trained
        return [*([{"role": "system", "content": system}] if system else []), *chat]

    # ---- commands ----------------------------------------------------------------------------------------------

    def _obey(self, text: str) -> str:
        command, _, rest = text[1:].partition(" ")
        command, rest = command.replace("-", "_").lower(), rest.strip()
        actions: Mapping[str, Callable[[str], str]] = {
            "use": self._use,
            "compare": lambda names: self._compare(names.split()),
            "system": self._set_system,
            "seed": lambda number: self._set_number("seed", int, number),
            "tokens": lambda number: self._set_number("max_new_tokens", int, number),
            "max_new_tokens": lambda number: self._set_number("max_new_tokens", int, number),
            **{name: lambda value, name=name: self._set_sampling(name, value) for name in NUMBERS},  # type: ignore[misc]
            "reset": lambda _: self._reset(),
            "save": self._save,
            "help": lambda _: self._help(),
            "quit": lambda _: self._end(),
            "exit": lambda _: self._end(),
        }
        if command not in actions:
            raise ConfigError(f"there is no command /{command}: {suggest(command, actions, 20)} (// begins a message)")
        return actions[command](rest)

    def _use(self, name: str) -> str:
        self._known([name])
        if name not in self.histories:
            self.histories[name] = list(self.histories[self.speakers[0]])
        for other in [other for other in self.histories if other != name]:
            history = self.histories.pop(other)
            if len(self.speakers) > 1 and history:
                self.finished.append(self._with_system(history, other))
        self.speakers = [name]
        return f"{name} answers"

    def _compare(self, names: Sequence[str]) -> str:
        if len(set(names)) < 2:
            raise ConfigError(f"/compare takes two names or more, of {', '.join(self.names)}")
        known = self._known(names)
        start = self.histories[self.speakers[0]]
        self.histories = {name: list(self.histories.get(name, start)) for name in known}
        self.speakers = known
        return f"{' and '.join(known)} answer"

    def _known(self, names: Sequence[str]) -> list[str]:
        for name in names:
            if name not in self.names:
                raise ConfigError(f"there is no adapter {name!r}: {suggest(name, self.names)}")
        return list(dict.fromkeys(names))

    def _set_system(self, text: str) -> str:
        self.system = text
        return "system prompt set" if text else "no system prompt"

    def _set_number(self, name: str, kind: Callable[[str], int], text: str) -> str:
        number = _number(name, kind, text)
        if not (name == "max_new_tokens") <= number < 2**62:
            raise ConfigError(f"{name} is {number}, expected at least {int(name == 'max_new_tokens')}")
        setattr(self, name, number)
        if name == "seed":
            self._num_answers = 0
        return f"{name} {number}"

    def _set_sampling(self, name: str, text: str) -> str:
        changed = {**self.sampling, name: _number(name, NUMBERS[name], text)}
        generation_options(changed)
        self.sampling = changed
        return f"{name} {text}"

    def _reset(self) -> str:
        self.finished += [self._with_system(chat, name) for name, chat in self.histories.items() if chat]
        self.histories = {name: [] for name in self.speakers}
        self._num_answers = 0
        return "the conversation begins anew"

    def _save(self, file: str) -> str:
        if not file:
            raise ConfigError("/save takes the name of a file, such as /save chat.jsonl")
        path = as_path(file)
        if path.exists():
            raise ConfigError(f"{path} exists already: name another file")
        return f"{self.save(file)} conversations in {path}"

    def _help(self) -> str:
        width = max(map(len, COMMANDS))
        lines = [f"{command:<{width}}  {text}" for command, text in COMMANDS.items()]
        sampling = ", ".join(f"{name} {value:g}" for name, value in self.sampling.items()) or "the likeliest answer"
        settings = f"{sampling}; seed {self.seed}; at most {self.max_new_tokens} tokens"
        return "\n".join([*lines, f"adapters: {', '.join(self.names)}; in use: {', '.join(self.speakers)}", settings])

    def _end(self) -> str:
        self.has_ended = True
        return ""


def _number(name: str, kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"/{name} takes a number, found {text!r}") from None
