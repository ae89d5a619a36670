"""Which positions the prompts and prefixes of one entry take before a stack's text, and with what weight.

A Stack puts its parts one after the other, a Mix puts them over each other, each ending where the text begins.
Weights are strengths and Mix weights multiplied; 0 leaves a part out. Pure counting: it knows adapters by the lengths
they add, and nothing of tensors, hooks or calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kitout.errors import RouteError
from kitout.route import Composed, Mix, RouteEntry, Stack
from kitout.runtime.adapter import Adapter


@dataclass(frozen=True)
class VirtualTokens:
    """One adapter's positions."""

    name: str
    """The adapter's."""
    weight: float
    """Of its keys in attention."""
    offset: int
    """Of its first position, from the start of all virtual tokens."""
    num_tokens: int
    """How many positions it takes."""
    is_prompt: bool
    """A prompt, not a prefix."""
    after_first_token: bool = False
    """After the first token of the text, not before it."""


@dataclass(frozen=True)
class TokenLayout:
    """The virtual tokens of one entry."""

    length: int = 0
    """Positions before the text."""
    items: tuple[VirtualTokens, ...] = ()
    """What takes them, in order."""

    @property
    def prompts(self) -> tuple[VirtualTokens, ...]:
        return tuple(i for i in self.items if i.is_prompt)


TokenKind = Literal["prefix", "prompt"]


def prefixes_then_prompts(prefixes: TokenLayout, prompts: TokenLayout) -> TokenLayout:
    """Prefixes, then prompts, then the text: a prompt is text to all other adapters, wherever a Stack names it."""
    moved = (replace(i, offset=i.offset + prefixes.length) for i in prompts.items)
    return TokenLayout(prefixes.length + prompts.length, (*prefixes.items, *moved))


def layout_of(
    entry: RouteEntry, adapters: Mapping[str, Adapter], tower: str, kind: TokenKind, role: str = "kv.self"
) -> TokenLayout:
    """The prompts, or the prefixes (of attentions of this role), of an entry at one stack.

    RouteError for tokens in a Mix or at a strength, and for negative weights.
    """
    if entry is None or isinstance(entry, Composed):  # whose parts have no tokens
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
        raise RouteError(f"{adapter.name!r} has tokens in the sequence: strength is 1, or use(None) for without")
    if prefixes and adapter.strength < 0:
        raise RouteError(f"{adapter.name!r} has a prefix: its strength is a weight of attention, at least 0")
    if not (prompts or prefixes) or not adapter.strength:
        return TokenLayout()
    delta = (prompts or prefixes)[0].delta
    length = max(part.delta.num_tokens for part in (prompts or prefixes))
    return TokenLayout(
        length, (VirtualTokens(adapter.name, adapter.strength, 0, length, bool(prompts), delta.after_first_token),)
    )


def _overlay(parts: list[tuple[TokenLayout, float]]) -> TokenLayout:
    parts = [(layout, weight) for layout, weight in parts if layout.items and weight]
    length = max((layout.length for layout, _ in parts), default=0)
    items: list[VirtualTokens] = []
    for layout, weight in parts:
        if layout.prompts:
            names = ", ".join(repr(i.name) for i in layout.prompts)
            raise RouteError(f"{names} in a Mix: tokens in the sequence have no weight; use Stack")
        if weight < 0:
            raise RouteError(f"a Mix weight of {weight} on a prefix: it is a weight of attention, at least 0")
        shift = length - layout.length
        items += [replace(i, offset=i.offset + shift, weight=i.weight * weight) for i in layout.items]
    return TokenLayout(length, tuple(items))
