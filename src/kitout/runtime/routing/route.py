"""Routes: which adapters are active, as data. `Stack`, `Mix`, rows and None, brought to one normal form.

A route is an entry for the whole batch or a tuple of entries, one per row; an entry is None, an adapter's name, a
`Stack` of entries applied in order or a `Mix` of weighted entries. Pure data: it knows nothing of modules or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kitout.errors import RouteError


@dataclass(frozen=True, init=False)
class Stack:
    """Adapters applied in order at every site: `Stack("medic", "legal")`."""

    parts: tuple[RouteEntry, ...]
    """The entries, the one applied first at the front."""

    def __init__(self, *parts: RouteEntry) -> None:
        if not parts:
            raise RouteError("Stack() is empty: name at least one adapter, or use None for the base")
        object.__setattr__(self, "parts", tuple(check_entry(p) for p in parts if p is not None))


@dataclass(frozen=True, init=False)
class Mix:
    """Weighted entries: `Mix({"legal": 0.7, "medic": 0.3})`.

    At every module f(x) + sum_i w_i (f_i(x) - f(x)), f_i being the module f as entry i leaves it.
    """

    parts: tuple[tuple[RouteEntry, float], ...]
    """The entries with their weights."""

    def __init__(self, weights: Mapping[str | Stack, float]) -> None:
        if not isinstance(weights, Mapping) or not weights:
            raise RouteError(f"Mix({weights!r}) has no weights: write Mix({{'legal': 0.7, 'medic': 0.3}})")
        invalid = {
            k: w for k, w in weights.items() if not isinstance(w, (int, float)) or w != w or abs(w) == float("inf")
        }
        if invalid:
            raise RouteError(f"Mix weights must be finite numbers, found {invalid}")
        object.__setattr__(self, "parts", tuple((check_entry(k), float(w)) for k, w in weights.items()))


RouteEntry = str | Stack | Mix | None
Route = RouteEntry | tuple[RouteEntry, ...]


def check_entry(value: object) -> RouteEntry:
    """One entry, or a RouteError that says what an entry can be."""
    if value is None or isinstance(value, (str, Stack, Mix)):
        return value
    raise RouteError(
        f"cannot use {value!r} ({type(value).__name__}): write a name, None, Stack('a', 'b'), Mix({{'a': 0.5}}), "
        "or a list with one of these per row of the batch"
    )


def normalize_route(value: object) -> Route:
    """The normal form of what a user hands to `use`."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise RouteError("an empty list of rows: give one entry per row of the batch, None for base rows")
        return tuple(check_entry(v) for v in value)
    return check_entry(value)


def simplify(entry: RouteEntry, acts: Callable[[str], bool] | None = None) -> RouteEntry:
    """The shortest entry that computes the same, of those names alone that act (at some module, say).

    A Stack in a Stack and a Mix in a Mix are taken apart, equal parts of a Mix are added up, weights of 0 are dropped,
    and what has one part left, of weight 1, is that part.
    """
    if entry is None or isinstance(entry, str):
        return entry if entry is None or acts is None or acts(entry) else None
    if isinstance(entry, Stack):
        parts: list[RouteEntry] = []
        for part in (simplify(part, acts) for part in entry.parts):
            parts += part.parts if isinstance(part, Stack) else [part] * (part is not None)
        return parts[0] if len(parts) == 1 else Stack(*parts) if parts else None
    weights: dict[Any, float] = {}
    for part, weight in ((simplify(part, acts), weight) for part, weight in entry.parts if weight):
        inner = part.parts if isinstance(part, Mix) else [(part, 1.0)] * (part is not None)
        for each, inner_weight in inner:
            weights[each] = weights.get(each, 0.0) + weight * inner_weight
    weights = {part: weight for part, weight in weights.items() if weight}
    if list(weights.values()) == [1.0]:
        return next(iter(weights))
    return Mix(weights) if weights else None


def adapter_names(value: Route) -> Iterator[str]:
    """Every adapter name in a route, repeats included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Stack):
        for part in value.parts:
            yield from adapter_names(part)
    elif isinstance(value, Mix):
        for part, _ in value.parts:
            yield from adapter_names(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from adapter_names(part)
