"""What one types next with a trained adapter: two commands, and lines of Python that print an answer as they stand.

The same for the terminal, the report and the card, which names another folder. What is shown as input comes from data,
so it is quoted for the shell and for Python, and nothing in it can act on a terminal. It knows plain values, no run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kitout.format import escape_terminal

MAX_CHARS = 100  # of an input that is shown
OWN_TEXT = "A text of your own."
NEW_TOKENS = 64  # that go on from a text, which has no end of its own
IN_DOUBLE_QUOTES = re.compile(r'[^"$`\\!%]*')  # what no shell acts on inside double quotes


@dataclass(frozen=True, kw_only=True)
class NextSteps:
    """How one adapter is used, as text."""

    folder: str
    """Where the adapter is."""
    base: str = ""
    """What stands for the base's folder, where kitout cannot find it by its name; else empty."""
    text: str = ""
    """An input of the test split: a text, a prompt, or the path of an image."""
    row: Mapping[str, str] | None = None
    """An input of several columns, in place of `text`."""
    messages: Sequence[Mapping[str, Any]] = ()
    """A chat up to what is to be answered."""
    file: str = ""
    """A file or folder of inputs; empty: one is asked for."""
    writes: bool = False
    """Whether it writes text freely; else it gives labels, numbers or tags."""

    is_image: bool = False
    """Whether `text` is the path of an image."""
    rewards_on: str = ""
    """Of a reward adapter, the base on which it rewards a policy, by name; else empty."""

    def on_any_machine(self, base: str) -> NextSteps:
        """The same in words that stand for paths, and without an example of the data: a card is published."""
        return replace(
            self,
            folder="FOLDER",
            base=base,
            file="",
            text="IMAGE" if self.is_image else OWN_TEXT if self.text else "",
            row=None if self.row is None else dict.fromkeys(self.row, OWN_TEXT),
            messages=[{"role": "user", "content": OWN_TEXT}] if self.messages else (),
        )

    @property
    def commands(self) -> list[str]:
        """Two commands of a shell."""
        adapter = f"{_shell(self.folder)}{f' --model {_shell(self.base)}' if self.base else ''}"
        from_file = f"kitout predict {adapter} {_shell(self.file) if self.file else 'FILE'} --out predictions.jsonl"
        if self.rewards_on:
            reward = f"--model {_shell(self.base or self.rewards_on)} --data PROMPTS --reward {_shell(self.folder)}"
            return [f"kitout align ppo {reward} --out DIR", from_file]
        if self.writes:
            return [f"kitout chat {adapter}", from_file]
        if not self.text:
            return [from_file]
        separator = "-- " if self.text.startswith("-") else ""
        return [f"kitout predict {adapter} {separator}{_shell(self.text)}", from_file]

    @property
    def python_lines(self) -> list[str]:
        """Lines of Python that print one answer."""
        base = f", base={_python(self.base)}" if self.base else ""
        if self.messages:
            call = f"p.chat({_python([dict(message) for message in self.messages])})"
        elif self.writes:
            call = f"p.generate({_python(self.text)}, max_new_tokens={NEW_TOKENS})"
        else:
            call = f"p({_python(self.row if self.row is not None else self.text)})"
        return ["import kitout", f"p = kitout.load({_python(self.folder)}{base})", f"print({call})"]


def shorten(text: str, max_chars: int = MAX_CHARS) -> str:
    """The start of a text, up to the end of a word where there is one."""
    if len(text) <= max_chars:
        return text
    start = text[: max_chars + 1]
    cut = max(start.rfind(blank) for blank in " \n\t")
    return start[: cut if cut > max_chars // 2 else max_chars].rstrip()


def _shell(text: str) -> str:
    """One word of a command, on one line; double quotes where they do, because every shell knows them."""
    word = " ".join(escape_terminal(text).split())
    if shlex.quote(word) == word:
        return word
    return f'"{word}"' if IN_DOUBLE_QUOTES.fullmatch(word) else shlex.quote(word)


def _python(value: Any) -> str:
    """A literal, its texts in double quotes where they hold none; what does not print is escaped."""
    if isinstance(value, str):
        text = repr(value)
        return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text else text
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python(key)}: {_python(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_python, value)) + "]"
    return repr(value)
