"""Visual prompts among an image's tokens: inserted at a block, overwritten at later ones, dropped after the last.

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

from kitout.base.memory import is_out_of_memory
from kitout.device_constants import constant
from kitout.errors import KitoutError, RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, Program, first_tensor, replace_first_tensor
from kitout.runtime.modules.module_adapter import SiteDelta
from kitout.runtime.modules.programs import repack_output, unpack_output
from kitout.runtime.modules.rows import RowPlan, scatter
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot

FIRST_SLOT = 1  # the slots' first column


@dataclass(frozen=True)
class ImageTokenGroup:
    """One adapter's slots in one entry."""

    offset: int
    """Of its first slot among all of the entry."""
    num_tokens: int
    """How many slots it has."""
    by_block: dict[int, SiteDelta]
    """What overwrites them, by the number of the block."""

    @property
    def first_block(self) -> int:
        """The block at which they begin."""
        return min(self.by_block)


class ImageTokens:
    """The slots of one stack under one route. entries: the groups of each."""

    def __init__(
        self, entries: Sequence[Sequence[ImageTokenGroup]], row_plan: RowPlan | None, forward_slot: ForwardSlot
    ) -> None:
        self.entries, self.row_plan, self.forward_slot = entries, row_plan, forward_slot
        self.num_tokens = max(sum(h.num_tokens for h in each) for each in entries)
        self.first_block = min(h.first_block for each in entries for h in each)

    def changes_at(self, block: int) -> bool:
        return block == self.first_block or any(block in h.by_block for each in self.entries for h in each)

    def hides_at(self, block: int) -> bool:
        """Whether some row has slots at this block that nobody attends to."""
        shown = [sum(h.num_tokens for h in each if h.first_block <= block) for each in self.entries]
        return block >= self.first_block and min(shown) < self.num_tokens

    def insert(self, x: Tensor, block: int) -> Tensor:
        """The stream as the block takes it: with the slots put in, or those overwritten that begin anew here."""
        if block == self.first_block:
            self.forward_slot.state.drop_image_tokens = partial(self.clean_output, tokens=x.shape[1])
            x = torch.cat(
                (x[:, :FIRST_SLOT], x.new_zeros(x.shape[0], self.num_tokens, x.shape[2]), x[:, FIRST_SLOT:]), 1
            )
        rows = [self._row(each, x, block) for each in self.entries]
        if self.row_plan is None:
            new = self._overwrite(x, rows[0])
        else:
            index = self.row_plan.index(x.shape[0], x.device)
            new = scatter([self._overwrite(x[i], row) for i, row in zip(index, rows, strict=True)], index)
        return torch.cat((x[:, :FIRST_SLOT], new, x[:, FIRST_SLOT + self.num_tokens :]), 1)

    def _row(self, each: Sequence[ImageTokenGroup], x: Tensor, block: int) -> list[tuple[int, Tensor]]:
        return [(h.offset, h.by_block[block].delta.token_vectors().to(x.dtype)) for h in each if block in h.by_block]

    def _overwrite(self, x: Tensor, new: list[tuple[int, Tensor]]) -> Tensor:
        """x's slots [b, width, d] with new vectors at their offsets."""
        pieces, end = [], 0
        for offset, vectors in new:
            pieces += [x[:, FIRST_SLOT + end : FIRST_SLOT + offset], vectors.expand(x.shape[0], -1, -1)]
            end = offset + len(vectors)
        return torch.cat([*pieces, x[:, FIRST_SLOT + end : FIRST_SLOT + self.num_tokens]], 1)

    def clean_output(self, output: Any, tokens: int) -> Any:
        """A model's output with the slots taken out of its hidden states, which have `tokens` without them."""
        if not isinstance(output, Mapping):
            return output
        if "feature_maps" in output:
            raise RouteError(
                "a backbone's feature maps are inner states of its blocks, and would contain the visual prompts"
            )
        states = output.get("hidden_states")
        if isinstance(states, tuple):
            wide = tokens + self.num_tokens
            output["hidden_states"] = tuple(  # type: ignore[index]
                self.drop(s) if isinstance(s, Tensor) and s.ndim == 3 and s.shape[1] == wide else s for s in states
            )
        return output

    def drop(self, y: Tensor) -> Tensor:
        return torch.cat((y[:, :FIRST_SLOT], y[:, FIRST_SLOT + self.num_tokens :]), 1)

    def hidden_columns(self, x: Tensor, block: int) -> Tensor:
        """[B or 1, tokens]: columns that nobody attends to."""
        by_entry = []
        for each in self.entries:
            hidden = [FIRST_SLOT <= column < FIRST_SLOT + self.num_tokens for column in range(x.shape[1])]
            for group in each:
                if group.first_block <= block:
                    start = FIRST_SLOT + group.offset
                    hidden[start : start + group.num_tokens] = [False] * group.num_tokens
            by_entry.append(tuple(hidden))
        columns = constant(tuple(by_entry), x.device, torch.bool)
        if self.row_plan is None:
            return columns
        self.row_plan.check()
        return columns[constant(tuple(self.row_plan.repeat_to(x.shape[0])), x.device, torch.long)]


class ImageTokenBlock:
    """The program of a block with slots.

    last: the block that ends the stack. averaging: path of the stack, where something in it averages over positions.
    """

    def __init__(
        self, image_tokens: ImageTokens, block: int, is_last: bool, inner: Program | None, averaging: str | None = None
    ) -> None:
        self.image_tokens, self.block, self.is_last, self.inner = image_tokens, block, is_last, inner
        self.averaging = averaging

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.image_tokens.changes_at(self.block):
            x = first_tensor(args, kwargs)
            self._check(x, args, kwargs)
            args, kwargs = replace_first_tensor(args, kwargs, self.image_tokens.insert(x, self.block))
        real = self.image_tokens.forward_slot.state.real_positions
        if self.averaging is not None:
            x = first_tensor(args, kwargs)
            hidden = self.image_tokens.hidden_columns(x, self.block)
            real[self.averaging] = ~hidden.expand(x.shape[0], -1)
        try:
            out = forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)
        except (RuntimeError, ValueError) as error:
            first = self.block == self.image_tokens.first_block
            if not first or isinstance(error, KitoutError) or is_out_of_memory(error):
                raise
            raise RouteError(
                f"block {self.block} takes no tokens between those of its image: {error}. Visual prompts do not fit "
                "this model"
            ) from error
        finally:
            if self.averaging is not None:
                real.pop(self.averaging, None)
        if not self.is_last:
            return out
        y, wrapping = unpack_output(out)
        return repack_output(self.image_tokens.drop(y), wrapping)

    def _check(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """RouteError where the block gets something for each token that the new ones do not have."""
        if self.block != self.image_tokens.first_block or x.ndim != 3:
            return
        for value in (*args[1:], *kwargs.values()):
            for t in value if isinstance(value, tuple) else (value,):
                if isinstance(t, Tensor) and x.shape[1] in t.shape:
                    raise RouteError(
                        f"block {self.block} is given {list(t.shape)} for its {x.shape[1]} tokens (a mask, positions), "
                        "and tokens put in between have none: visual prompts do not fit this model"
                    )
