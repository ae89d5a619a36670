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
from kitout.runtime.routing.route import Mix, RouteEntry, Stack


@dataclass(frozen=True)
class VirtualTokens:
    """One adapter's positions. offset: of its first, from the start of all. tokens: a prompt, not a prefix."""

    name: str
    weight: float
    offset: int
    num_tokens: int
    is_prompt: bool
    after_first_token: bool = False  # the first token of the text


@dataclass(frozen=True)
class TokenLayout:
    """length: positions in front of the text."""

    length: int = 0
    items: tuple[VirtualTokens, ...] = ()

    @property
    def prompts(self) -> tuple[VirtualTokens, ...]:
        return tuple(i for i in self.items if i.is_prompt)


TokenKind = Literal["prefix", "prompt"]


def prefixes_then_prompts(prefixes: TokenLayout, prompts: TokenLayout) -> TokenLayout:
    """Prefixes, then prompts, then the text: a prompt is text to all else that is worn, wherever a Stack names it."""
    moved = (replace(i, offset=i.offset + prefixes.length) for i in prompts.items)
    return TokenLayout(prefixes.length + prompts.length, (*prefixes.items, *moved))


def layout_of(
    entry: RouteEntry, adapters: Mapping[str, Adapter], tower: str, kind: TokenKind, role: str = "kv.self"
) -> TokenLayout:
    """The prompts, or the prefixes (of attentions of this role), of an entry at one stack.

    RouteError for tokens in a Mix or at a strength, and for negative weights.
    """
    if entry is None:
        return TokenLayout()
    if isinstance(entry, str):
        return _layout_of_adapter(adapters[entry], tower, kind, role)
    if isinstance(entry, Mix):
        return _overlay([(layout_of(part, adapters, tower, kind, role), weight) for part, weight in entry.parts])
    assert isinstance(entry, Stack)
    items: list[VirtualTokens] = []
    length = 0
    for part in entry.parts:
        more = layout_of(part, adapters, tower, kind, role)
        items += [replace(i, offset=i.offset + length) for i in more.items]
        length += more.length
    return TokenLayout(length, tuple(items))


def _layout_of_adapter(adapter: Adapter, tower: str, kind: TokenKind, role: str) -> TokenLayout:
    prompts = adapter.prompts.get(tower, []) if kind == "prompt" else []
    prefixes = adapter.prefixes_at(tower, role) if kind == "prefix" else []
    if prompts and adapter.strength != 1.0:
        raise RouteError(f"{adapter.name!r} has tokens in the sequence: they are there or not, at no strength between")
    if prefixes and adapter.strength < 0:
        raise RouteError(f"{adapter.name!r} has a prefix: its strength is a weight of attention, and not below 0")
    if not (prompts or prefixes) or not adapter.strength:
        return TokenLayout()
    delta = (prompts or prefixes)[0].delta
    length = max(part.delta.num_tokens for part in (prompts or prefixes))
    return TokenLayout(
        length, (VirtualTokens(adapter.name, adapter.strength, 0, length, bool(prompts), delta.after_first_token),)
    )


def _overlay(parts: list[tuple[TokenLayout, float]]) -> TokenLayout:
    parts = [(laid, weight) for laid, weight in parts if laid.items and weight]
    length = max((laid.length for laid, _ in parts), default=0)
    items: list[VirtualTokens] = []
    for laid, weight in parts:
        if laid.prompts:
            named = ", ".join(repr(i.name) for i in laid.prompts)
            raise RouteError(f"{named} in a Mix: tokens in the sequence cannot be there in part; use Stack")
        if weight < 0:
            raise RouteError(f"a Mix weight of {weight} on a prefix: it is a weight of attention, and not below 0")
        shift = length - laid.length
        items += [replace(i, offset=i.offset + shift, weight=i.weight * weight) for i in laid.items]
    return TokenLayout(length, tuple(items))
