"""The errors kitout raises: one class per kind of error, all of them `KitoutError`.

Each message names the error, the values found and what to write instead. Code that can meet several errors collects
them with `Errors` and raises once. This module knows nothing of models, methods or files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any


class KitoutError(Exception):
    """Base of every error kitout raises on purpose."""


class TargetError(KitoutError, ValueError):
    """A target, role or layer selection that matches nothing, or asks for what the model does not have."""


class ConfigError(KitoutError, ValueError):
    """A method setting outside its range (rank <= 0, unknown preset, ...)."""


class AdapterExists(KitoutError, ValueError):
    """An adapter of that name already exists."""


class InvalidAdapterName(KitoutError, ValueError):
    """An adapter name that is not safe to print, index and write to disk."""


class UnknownAdapter(KitoutError, KeyError):
    """A name that no adapter has."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class RouteError(KitoutError, ValueError):
    """A route that cannot be followed: wrong number of rows, a row at a site without rows, an empty mix."""


class NotMergeable(KitoutError, ValueError):
    """An adapter (or a site of it) that has no exact form in the weights of the base."""


class MergeStateError(KitoutError, RuntimeError):
    """An action that the merged state forbids, or an unmerge of what is not merged."""


class AlreadyAttached(KitoutError, RuntimeError):
    """The model already has a kit attached."""


class KitDetached(KitoutError, RuntimeError):
    """A kit used after its `detach`."""


class ForkedModel(KitoutError, RuntimeError):
    """A model used in a process that was forked while another thread was inside a call of it."""


class NoBlocksFound(KitoutError, ValueError):
    """No stack of transformer blocks was found and no roles were given."""


class UnusedSite(KitoutError, RuntimeError):
    """A chosen site that never fires in the model's forward, or an adapter that training would not change."""

    names: tuple[str, ...] = ()
    """The adapters it is about; empty where that is not known."""

    @classmethod
    def of(cls, names: Iterable[str], message: str) -> UnusedSite:
        """About these adapters."""
        error = cls(message)
        error.names = tuple(names)
        return error


class FileError(KitoutError, ValueError):
    """An adapter folder that is missing, damaged, hostile or written for something else."""


class PathError(FileError, OSError):
    """A path that the system refuses: not there, no permission, a full or read-only disk, a name that is too long."""


class WrongBase(FileError):
    """An adapter file made for another base model."""


class DataError(KitoutError, ValueError):
    """Data that cannot be read or trained on: a missing column, an empty label, an image that does not open."""


class BadRows(DataError):
    """Rows of data that cannot be read or trained on, while the others can."""

    messages: Mapping[int, str] = MappingProxyType({})
    """What is wrong, by the number of the example among those that were given; empty where rows are known by line."""


class UnusableFormat(DataError):
    """A table whose examples are of a kind that the caller cannot use, such as preference pairs for plain training."""

    def __init__(self, message: str, reading: Any = None, row: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.reading = reading
        """How the table is read (a `TableReading`)."""
        self.row = row
        """Its first row."""


class TrainingDiverged(KitoutError, ArithmeticError):
    """A training run whose loss or gradients are no longer finite, or whose loss grew without return."""


class PackingLeak(KitoutError, RuntimeError):
    """A model in which an example of a packed row changes the loss of another example in that row."""


class RewardError(KitoutError, ValueError):
    """A reward that cannot be opened, or that gives something else than one finite number or None per answer."""


class AssetError(KitoutError, RuntimeError):
    """An asset that is unknown, not installed, damaged or could not be downloaded."""


class Errors:
    """Collects messages and raises them together, so that a user corrects a file or a call once, not once per error."""

    def __init__(self, error: type[KitoutError], heading: str) -> None:
        self.error, self.heading = error, heading
        self.messages: list[str] = []
        self._num_hidden = 0  # errors that are counted in a message of others

    def add(self, message: str) -> None:
        self.messages.append(message)

    @property
    def num_errors(self) -> int:
        """How many there are, those without a message of their own included."""
        return len(self.messages) + self._num_hidden

    def add_more(self, number: int, what: str) -> None:
        """Counts errors that have no message of their own, in one line; none if number is 0 or less."""
        if number > 0:
            self.messages.append(f"and {number:,} more {what}")
            self._num_hidden += number - 1

    def shorten(self, max_shown: int, what: str) -> None:
        """Keeps the first messages and counts the others; one alone is shown, since it takes no more room."""
        number = len(self.messages) - max_shown
        if number > 1:
            del self.messages[max_shown:]
            self.add_more(number, what)

    def raise_if_any(self) -> None:
        """Raises the one message there is, or all as a list under the heading, which says how many there are."""
        if len(self.messages) == 1:
            raise self.error(f"{self.heading}: {self.messages[0]}")
        if self.messages:
            raise self.error("\n  - ".join([f"{self.heading}: {self.num_errors:,} errors", *self.messages]))


MAX_WORD_CHARS = 200  # of a word or candidate in a message: labels come from data


def suggest(word: str, candidates: Iterable[str], max_shown: int = 8) -> str:
    """`did you mean ...` where something is close, else the first few known words."""
    candidates = [candidate[:MAX_WORD_CHARS] for candidate in candidates]
    close = difflib.get_close_matches(word[:MAX_WORD_CHARS], candidates, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(map(repr, close)) + "?"
    shown = ", ".join(map(repr, candidates[:max_shown]))
    return f"known: {shown}{', ...' if len(candidates) > max_shown else ''}" if candidates else "there are none"
