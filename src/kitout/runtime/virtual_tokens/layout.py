"""Where prompts and prefixes of one entry of a route come to lie in front of a stack's text, and with what weight.

A Stack lays its parts one after the other, a Mix lays them over each other, each ending where the text begins. Weights
are strengths and Mix shares multiplied; 0 takes a part out altogether. Pure counting: it knows adapters by the lengths
they add and nothing of tensors, taps or calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kitout.errors import RouteError
from kitout.runtime.adapter import Adapter
from kitout.runtime.routing.route import Entry, Mix, Stack


@dataclass(frozen=True)
class Item:
    """One adapter's positions. offset: of its first, from the start of all. tokens: a prompt, not a prefix."""

    name: str
    weight: float
    offset: int
    length: int
    tokens: bool
    after: bool = False  # the first token of the text


@dataclass(frozen=True)
class Layout:
    """length: positions in front of the text."""

    length: int = 0
    items: tuple[Item, ...] = ()

    @property
    def prompts(self) -> tuple[Item, ...]:
        return tuple(i for i in self.items if i.tokens)


Which = Literal["past", "tokens"]


def joined(prefixes: Layout, prompts: Layout) -> Layout:
    """Prefixes, then prompts, then the text: a prompt is text to all else that is worn, wherever a Stack names it."""
    moved = (replace(i, offset=i.offset + prefixes.length) for i in prompts.items)
    return Layout(prefixes.length + prompts.length, (*prefixes.items, *moved))


def layout(entry: Entry, adapters: Mapping[str, Adapter], tower: str, which: Which, role: str = "kv.self") -> Layout:
    """The prompts, or the prefixes (of attentions of this role), of an entry at one stack.

    RouteError for tokens in a Mix or at a strength, and for negative weights.
    """
    if entry is None:
        return Layout()
    if isinstance(entry, str):
        return _one(adapters[entry], tower, which, role)
    if isinstance(entry, Mix):
        return _overlaid([(layout(part, adapters, tower, which, role), weight) for part, weight in entry.parts])
    assert isinstance(entry, Stack)
    items: list[Item] = []
    length = 0
    for part in entry.parts:
        more = layout(part, adapters, tower, which, role)
        items += [replace(i, offset=i.offset + length) for i in more.items]
        length += more.length
    return Layout(length, tuple(items))


def _one(adapter: Adapter, tower: str, which: Which, role: str) -> Layout:
    prompts = adapter.tokens.get(tower, []) if which == "tokens" else []
    prefixes = adapter.pasts_at(tower, role) if which == "past" else []
    if prompts and adapter.strength != 1.0:
        raise RouteError(f"{adapter.name!r} has tokens in the sequence: they are there or not, at no strength between")
    if prefixes and adapter.strength < 0:
        raise RouteError(f"{adapter.name!r} has a prefix: its strength is a weight of attention, and not below 0")
    if not (prompts or prefixes) or not adapter.strength:
        return Layout()
    delta = (prompts or prefixes)[0].delta
    length = max(part.delta.length for part in (prompts or prefixes))
    return Layout(length, (Item(adapter.name, adapter.strength, 0, length, bool(prompts), delta.after),))


def _overlaid(parts: list[tuple[Layout, float]]) -> Layout:
    parts = [(laid, weight) for laid, weight in parts if laid.items and weight]
    length = max((laid.length for laid, _ in parts), default=0)
    items: list[Item] = []
    for laid, weight in parts:
        if laid.prompts:
            named = ", ".join(repr(i.name) for i in laid.prompts)
            raise RouteError(f"{named} in a Mix: tokens in the sequence cannot be there in part; use Stack")
        if weight < 0:
            raise RouteError(f"a Mix weight of {weight} on a prefix: it is a weight of attention, and not below 0")
        shift = length - laid.length
        items += [replace(i, offset=i.offset + shift, weight=i.weight * weight) for i in laid.items]
    return Layout(length, tuple(items))
