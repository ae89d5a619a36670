"""Routes: which adapters are active, as data: names, `Stack`, `Mix`, `Only`, `Average`, rows and None.

A route is an entry for the whole batch, a tuple of entries, one per row, or an `Average` of entries. An entry is None,
an adapter's name, a `Stack` applied in order, a weighted `Mix`, or `Only` some layers of one. A composition
(`methods/compositions/`) holds a route, so files have them as json. Pure data: it knows nothing of modules or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


@dataclass(frozen=True, init=False)
class Only:
    """An entry in some layers alone: `Only("legal", layers="last:8")`. What it has outside the blocks is left out."""

    entry: RouteEntry
    """The entry."""
    layers: str
    """The layers, as methods take them: "last:8", "0,3,5", "decoder/last:4"."""

    def __init__(self, entry: RouteEntry, layers: str) -> None:
        if entry is None or not isinstance(layers, str) or not layers.strip():
            raise RouteError(f"Only({entry!r}, layers={layers!r}): write Only('legal', layers='last:8')")
        object.__setattr__(self, "entry", check_entry(entry))
        object.__setattr__(self, "layers", layers)


@dataclass(frozen=True, init=False)
class Average:
    """Outputs averaged: every row runs under each entry, and the model's outputs are averaged by weight.

    of: "probabilities" (the logits are then their logarithms) or "logits". The weights sum to 1. A route by itself: it
    is no entry of another, and rows are not averaged apart. With one entry left it is that entry, logits included.
    """

    parts: tuple[tuple[RouteEntry, float], ...]
    """The entries with their weights."""
    of: Literal["probabilities", "logits"]
    """What is averaged."""

    def __init__(self, weights: Mapping[Any, float], of: Literal["probabilities", "logits"] = "probabilities") -> None:
        parts = Mix(weights).parts
        values = [weight for _, weight in parts]
        if of not in ("probabilities", "logits"):
            raise RouteError(f"Average(of={of!r}): write of='probabilities' or of='logits'")
        if abs(sum(values) - 1.0) > 1e-6:
            raise RouteError(f"the weights of an Average sum to 1, found {sum(values):g}")
        if of == "probabilities" and min(values) < 0:
            raise RouteError(f"weights of probabilities are not below 0, found {min(values):g}; write of='logits'")
        object.__setattr__(self, "parts", tuple((part, weight) for part, weight in parts if weight))
        object.__setattr__(self, "of", of)


@dataclass(frozen=True)
class Composed:
    """An adapter that makes something of what its parts make of each module (a learned mixture, say).

    Not for users, who write its name: compiling a route puts it in the name's place.
    """

    name: str
    """The adapter's."""
    parts: tuple[RouteEntry, ...]
    """Its parts, in its own order; None where one has nothing."""


RouteEntry = str | Stack | Mix | Only | Composed | None
Route = RouteEntry | Average | tuple[RouteEntry, ...]


def check_entry(value: object) -> RouteEntry:
    """One entry, or a RouteError that says what an entry can be."""
    if value is None or isinstance(value, (str, Stack, Mix, Only, Composed)):
        return value
    if isinstance(value, Average):
        raise RouteError(f"{value!r} averages whole outputs: it is a route by itself, and no entry or row of another")
    raise RouteError(
        f"cannot use {value!r} ({type(value).__name__}): write a name, None, Stack('a', 'b'), Mix({{'a': 0.5}}), "
        "Only('a', 'last:8'), Average({'a': 0.5, 'b': 0.5}) or a list with one of these per row of the batch"
    )


def normalize_route(value: object) -> Route:
    """The normal form of what a user hands to `use`."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise RouteError("an empty list of rows: give one entry per row of the batch, None for base rows")
        return tuple(check_entry(v) for v in value)
    return value if isinstance(value, Average) else check_entry(value)


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
    if isinstance(entry, Only):
        remaining = simplify(entry.entry, acts)
        return None if remaining is None else Only(remaining, entry.layers)
    if isinstance(entry, Composed):
        if acts is not None and not acts(entry.name):
            return None
        found = tuple(simplify(part, acts) for part in entry.parts)
        return entry.name if all(part is None for part in found) else Composed(entry.name, found)
    assert isinstance(entry, Mix)
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
    elif isinstance(value, (Mix, Average)):
        for part, _ in value.parts:
            yield from adapter_names(part)
    elif isinstance(value, Only):
        yield from adapter_names(value.entry)
    elif isinstance(value, Composed):
        yield value.name
        for part in value.parts:
            yield from adapter_names(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from adapter_names(part)


def route_to_json(entry: RouteEntry | Average) -> Any:
    """A route as json has it: a name, {"stack": [...]}, {"mix": [[entry, weight], ...]}, {"only": entry, "layers": ...}
    or {"average": [[entry, weight], ...], "of": ...}.
    """
    if isinstance(entry, Stack):
        return {"stack": [route_to_json(part) for part in entry.parts]}
    if isinstance(entry, Mix):
        return {"mix": [[route_to_json(part), weight] for part, weight in entry.parts]}
    if isinstance(entry, Only):
        return {"only": route_to_json(entry.entry), "layers": entry.layers}
    if isinstance(entry, Average):
        return {"average": [[route_to_json(part), weight] for part, weight in entry.parts], "of": entry.of}
    return entry


def route_from_json(value: Any) -> Any:
    """The route of such a value; {"mix": {name: weight}} does too. What is none is returned as it is."""
    if not isinstance(value, Mapping):
        return value
    keys = set(value)
    if keys == {"stack"} and isinstance(value["stack"], Sequence) and not isinstance(value["stack"], str):
        return Stack(*map(route_from_json, value["stack"]))
    if keys == {"mix"}:
        return Mix(_weights_from_json(value["mix"]))
    if keys == {"only", "layers"}:
        return Only(route_from_json(value["only"]), value["layers"])
    if "average" in keys and keys <= {"average", "of"}:
        return Average(_weights_from_json(value["average"]), value.get("of", "probabilities"))
    return value


def _weights_from_json(value: Any) -> Any:
    pairs = isinstance(value, Sequence) and all(isinstance(p, Sequence) and len(p) == 2 for p in value)
    if not pairs:
        return value
    entries = [check_entry(route_from_json(part)) for part, _ in value]
    if twice := sorted({repr(entry) for entry in entries if entries.count(entry) > 1}):
        raise RouteError(f"{', '.join(twice)} stands twice among the weights: give each entry one")
    return dict(zip(entries, (weight for _, weight in value), strict=True))
