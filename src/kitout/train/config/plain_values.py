"""How large values may be: shared parts (aliases of YAML) can stand for more than any memory holds, or for themselves.

Everything that goes through a config walks, copies and prints it as if each alias were written out. So this is found
out first, in time that grows with what is written and not with what it stands for. It knows no config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kitout.errors import ConfigError

MAX_DEPTH, MAX_VALUES = 32, 100_000
CHARS_OF_ONE_VALUE = 64  # a long text counts as several values

PartsFn = Callable[[Any], Sequence[Any]]  # what a value is made of; empty for a single one


def check_size(root: Any, name: str, parts_of: PartsFn | None = None) -> None:
    """ConfigError if the value refers to itself, or comes to too many with every alias written out.

    name: of the whole, for the message. parts_of: of a tree that is not made of mappings and lists.
    """
    split = parts_of or _parts_of_plain
    counts: dict[int, int] = {}  # of what is counted already

    def count(value: Any, parents: tuple[int, ...]) -> int:
        if isinstance(value, str):
            return 1 + len(value) // CHARS_OF_ONE_VALUE
        if id(value) in counts:
            return counts[id(value)]
        if id(value) in parents:
            raise ConfigError(f"{name}: a part of it refers to itself (an alias *name within its own anchor &name)")
        parts = split(value)
        if not parts:
            return 1
        if len(parents) >= MAX_DEPTH:
            raise ConfigError(f"{name}: nested more than {MAX_DEPTH} levels deep")
        counts[id(value)] = 1 + sum(count(part, (*parents, id(value))) for part in parts)
        return counts[id(value)]

    if count(root, ()) > MAX_VALUES:
        raise ConfigError(
            f"{name}: with every alias (*name) written out it has more than {MAX_VALUES:,} values: write fewer"
        )


def _parts_of_plain(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set | frozenset) else ()
