"""The errors kitout raises: one class per kind of fault, all of them `KitoutError`.

Each message names the fault, the values found and what to write instead. Code that can meet several faults collects
them with `Faults` and raises once. This module knows nothing of models, methods or files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KitoutError(Exception):
    """Base of every error kitout raises on purpose."""


class TargetError(KitoutError, ValueError):
    """A target, role or layer selection that matches nothing, or asks for what the model does not have."""


class ConfigError(KitoutError, ValueError):
    """A method setting outside its range (rank <= 0, unknown preset, ...)."""


class NameTaken(KitoutError, ValueError):
    """An adapter of that name already exists."""


class BadName(KitoutError, ValueError):
    """An adapter name that is not safe to print, index and write to disk."""


class UnknownAdapter(KitoutError, KeyError):
    """A name no adapter carries."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class RouteError(KitoutError, ValueError):
    """A route that cannot be followed: wrong number of rows, a row at a site without rows, an empty mix."""


class NotMergeable(KitoutError, ValueError):
    """An adapter (or a site of it) that has no exact form in the weights of the base."""


class MergeState(KitoutError, RuntimeError):
    """An action that the merged state forbids, or an unmerge of what is not merged."""


class AlreadyAttached(KitoutError, RuntimeError):
    """The model already wears a kit."""


class Detached(KitoutError, RuntimeError):
    """A kit used after its `detach`."""


class NoBlocks(KitoutError, ValueError):
    """No stack of transformer blocks was found and no roles were given."""


class SilentSite(KitoutError, RuntimeError):
    """A chosen site that never fires in the model's forward."""


class FileError(KitoutError, ValueError):
    """An adapter folder that is missing, damaged, hostile or written for something else."""


class WrongBase(FileError):
    """An adapter file made for another base model."""


class Faults:
    """Collects messages and raises them together, so that a user mends a file or a call once, not once per fault."""

    def __init__(self, error: type[KitoutError], head: str) -> None:
        self.error, self.head, self.items = error, head, []  # type: ignore[var-annotated]

    def add(self, message: str) -> None:
        self.items.append(message)

    def raise_if_any(self) -> None:
        if len(self.items) == 1:
            raise self.error(f"{self.head}: {self.items[0]}")
        if self.items:
            raise self.error("\n  - ".join([f"{self.head}: {len(self.items)} faults", *self.items]))


def suggest(word: str, known: Iterable[str], most: int = 8) -> str:
    """`did you mean ...` where something is close, else the first few known words."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(map(repr, close)) + "?"
    shown = ", ".join(map(repr, known[:most]))
    return f"known: {shown}{', ...' if len(known) > most else ''}" if known else "there are none"
