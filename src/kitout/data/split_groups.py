"""Examples in groups (questions about one passage) for the splitter: a group, and inputs that are equal, stay together.

Two examples are of one unit if they have the same group or the same input, or if a chain of such pairs joins them.
Whole units are sampled, near the number of examples that is asked for. It knows keys of examples, and no example.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def find_units(pairs: Iterable[tuple[Hashable, str]]) -> dict[Hashable, Hashable]:
    """pairs: (key of the input, group) of every example; a group "" joins nothing. By key of an input: its unit."""
    parents: dict[Hashable, Hashable] = {}

    def find(node: Hashable) -> Hashable:
        parents.setdefault(node, node)
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    keys: dict[Hashable, None] = {}
    for key, group in pairs:
        keys[key] = None
        own = find(("input", key))
        if group:
            parents[find(("group", group))] = own
    return {key: find(("input", key)) for key in keys}


def sample_units(
    pool: Sequence[T], num_examples: int, seed: int | str, unit: Callable[[T], Hashable], stratum: Callable[[T], Any]
) -> set[int]:  # fmt: skip
    """Indices of whole units with about `num_examples` examples, of each stratum in proportion as far as units allow.

    stratum: of an example; a unit with examples of several is of a stratum of its own. One unit of each stays.
    """
    members: dict[Hashable, list[int]] = {}
    for i, example in enumerate(pool):
        members.setdefault(unit(example), []).append(i)
    strata: dict[Any, list[list[int]]] = {}
    for rows in members.values():
        found = {stratum(pool[i]) for i in rows}
        strata.setdefault((len(found) > 1, min(found)), []).append(rows)
    rng = random.Random(seed)
    taken: list[list[int]] = []
    left: list[list[int]] = []

    def fill(candidates: Sequence[list[int]], wanted: float) -> None:
        """Those of them that bring the number of examples nearer to what is wanted."""
        total = 0
        for rows in candidates:
            is_nearer = abs(total + len(rows) - wanted) < abs(total - wanted)
            (taken if is_nearer else left).append(rows)
            total += len(rows) if is_nearer else 0

    for name in sorted(strata):
        units = strata[name]
        rng.shuffle(units)
        fill(units[1:], num_examples * sum(map(len, units)) / len(pool))
    rest, left = left, []
    rng.shuffle(rest)
    fill(rest, num_examples - sum(map(len, taken)))
    return {i for rows in taken for i in rows}
