"""Tokens among an image's own: put in at a block, overwritten at later ones, taken out after the last.

They come after the sequence's first token (the class token); blocks that attend over the whole sequence do not care
where. Rows with fewer tokens than others, or whose tokens begin at a later block, have slots that nobody attends to.
It knows blocks by their number and rows by their entry, and nothing of adapters or methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import Forward, Program, first_tensor, with_first
from kitout.runtime.modules.module_adapter import Part
from kitout.runtime.modules.programs import join, split
from kitout.runtime.modules.rows import Plan, scatter
from kitout.runtime.virtual_tokens.forward_state import Here

AT = 1  # the slots' first column


@dataclass(frozen=True)
class Held:
    """One adapter's slots in one entry. parts: by block. first: the block at which they begin."""

    offset: int
    length: int
    parts: dict[int, Part]

    @property
    def first(self) -> int:
        return min(self.parts)


class Slots:
    """The slots of one stack under one route. entries: what each entry holds."""

    def __init__(self, entries: Sequence[Sequence[Held]], plan: Plan | None, here: Here) -> None:
        self.entries, self.plan, self.here = entries, plan, here
        self.width = max(sum(h.length for h in each) for each in entries)
        self.first = min(h.first for each in entries for h in each)

    def touches(self, block: int) -> bool:
        return block == self.first or any(block in h.parts for each in self.entries for h in each)

    def hides(self, block: int) -> bool:
        """Whether some row has slots at this block that nobody attends to."""
        shown = [sum(h.length for h in each if h.first <= block) for each in self.entries]
        return block >= self.first and min(shown) < self.width

    def fill(self, x: Tensor, block: int) -> Tensor:
        """The stream as the block takes it: with the slots put in, or those overwritten that begin anew here."""
        if block == self.first:
            self.here.call.slotted = partial(self.taken_out, tokens=x.shape[1])
            x = torch.cat((x[:, :AT], x.new_zeros(x.shape[0], self.width, x.shape[2]), x[:, AT:]), 1)
        rows = [self._row(each, x, block) for each in self.entries]
        if self.plan is None:
            new = self._slots(x, rows[0])
        else:
            index = self.plan.index(x.shape[0], x.device)
            new = scatter([self._slots(x[i], row) for i, row in zip(index, rows, strict=True)], index)
        return torch.cat((x[:, :AT], new, x[:, AT + self.width :]), 1)

    def _row(self, each: Sequence[Held], x: Tensor, block: int) -> list[tuple[int, Tensor]]:
        return [(h.offset, h.parts[block].delta.tokens().to(x.dtype)) for h in each if block in h.parts]

    def _slots(self, x: Tensor, new: list[tuple[int, Tensor]]) -> Tensor:
        """x's slots [b, width, d] with new vectors at their offsets."""
        pieces, end = [], 0
        for offset, vectors in new:
            pieces += [x[:, AT + end : AT + offset], vectors.expand(x.shape[0], -1, -1)]
            end = offset + len(vectors)
        return torch.cat([*pieces, x[:, AT + end : AT + self.width]], 1)

    def taken_out(self, output: Any, tokens: int) -> Any:
        """A model's output with the slots taken out of its hidden states, which have `tokens` without them."""
        if not isinstance(output, Mapping):
            return output
        if "feature_maps" in output:
            raise RouteError(
                "a backbone's feature maps are blocks' inner states, which visual prompts would be part of"
            )
        states = output.get("hidden_states")
        if isinstance(states, tuple):
            wide = tokens + self.width
            output["hidden_states"] = tuple(  # type: ignore[index]
                self.drop(s) if isinstance(s, Tensor) and s.ndim == 3 and s.shape[1] == wide else s for s in states
            )
        return output

    def drop(self, y: Tensor) -> Tensor:
        return torch.cat((y[:, :AT], y[:, AT + self.width :]), 1)

    def hidden(self, x: Tensor, block: int) -> Tensor:
        """[B or 1, tokens]: columns that nobody attends to."""
        columns = torch.zeros(len(self.entries), x.shape[1], dtype=torch.bool, device=x.device)
        columns[:, AT : AT + self.width] = True
        for row, each in zip(columns, self.entries, strict=True):
            for held in each:
                if held.first <= block:
                    row[AT + held.offset : AT + held.offset + held.length] = False
        if self.plan is None:
            return columns
        return columns[torch.tensor(self.plan.expanded(x.shape[0]), device=x.device)]


class Slotted:
    """The program of a block with slots. last: the block that ends the stack."""

    def __init__(self, slots: Slots, block: int, last: bool, then: Program | None) -> None:
        self.slots, self.block, self.last, self.then = slots, block, last, then

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.slots.touches(self.block):
            x = first_tensor(args, kwargs)
            self._check(x, args, kwargs)
            args, kwargs = with_first(args, kwargs, self.slots.fill(x, self.block))
        out = forward(module, *args, **kwargs) if self.then is None else self.then(module, forward, args, kwargs)
        if not self.last:
            return out
        y, whole = split(out)
        return join(self.slots.drop(y), whole)

    def _check(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """RouteError where the block is told of each token something that the new ones have not."""
        if self.block != self.slots.first or x.ndim != 3:
            return
        for value in (*args[1:], *kwargs.values()):
            for t in value if isinstance(value, tuple) else (value,):
                if isinstance(t, Tensor) and x.shape[1] in t.shape:
                    raise RouteError(
                        f"block {self.block} is given {list(t.shape)} for its {x.shape[1]} tokens (a mask, positions), "
                        "and tokens put in between have none: visual prompts do not fit this model"
                    )
