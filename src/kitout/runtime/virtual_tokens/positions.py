"""The entry of one stack of blocks: what happens to a call where its tokens become the stack's residual stream.

Position ids: a row with a prefix or a prompt counts its text from its mask, after the virtual tokens. Prompts before
causal blocks are run on their own (`prompt_prefill.py`); before others the sequence is widened (`widen_sequence.py`).
It knows calls by the names transformers gives their arguments, and nothing of adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kitout import fast
from kitout.base.memory import is_out_of_memory
from kitout.base.survey import Tower
from kitout.device_constants import constant
from kitout.errors import KitoutError, RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, Program, first_tensor, replace_first_tensor
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.routing.active import ActiveRoute
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot
from kitout.runtime.virtual_tokens.layout import TokenLayout
from kitout.runtime.virtual_tokens.prompt_prefill import PromptPrefill
from kitout.runtime.virtual_tokens.widen_sequence import SequenceWidener, trim_output


class TextEntry:
    """The program of the module that owns a stack.

    layouts: by entry, the virtual tokens its text sees as keys and values. widening: those that go into the sequence
    itself; cross_widening: likewise in the stack that this one reads. is_relative: positions are distances, which
    attention computes. passes_on: the module that runs the blocks is given the position ids of the model around it.
    num_positions: of the stack's table; None: as the config says.
    """

    def __init__(
        self,
        tower: Tower,
        layouts: Sequence[TokenLayout],
        row_plan: RowPlan | None,
        forward_slot: ForwardSlot,
        active: ActiveRoute,
        prefill: PromptPrefill | None = None,
        widening: SequenceWidener | None = None,
        cross_widening: SequenceWidener | None = None,
        inner: Program | None = None,
        is_relative: bool = False,
        passes_on: bool = False,
        num_positions: int | None = None,
    ) -> None:
        self.num_positions = num_positions
        self.tower, self.layouts, self.row_plan, self.forward_slot = tower, layouts, row_plan, forward_slot
        self.active, self.is_relative, self.passes_on = active, is_relative, passes_on
        self.prefill, self.widening, self.cross_widening, self.inner = prefill, widening, cross_widening, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = arguments_by_name(forward, args, kwargs)
        text = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        if not isinstance(text, Tensor):
            return forward(module, *args, **kwargs)  # the model itself says what is missing
        lengths = self._lengths(text.shape[0])
        self._check_cache(call, lengths)
        if self.cross_widening is not None:
            self.cross_widening.widen_mask(call, self.forward_slot.state)
        if self.widening is not None:
            if call.get("past_key_values") is not None:
                raise RouteError(
                    "a prompt before bidirectional blocks is part of every forward, and this one continues from a "
                    "cache: call it without a cache (use_cache=False)"
                )
            self.widening.widen(module, call, self.forward_slot.state)
        self._set_positions(module, call, text)
        if self.prefill is not None:
            call = self.prefill.run(module, call, text.shape[0])
        try:
            out = forward(module, **call) if self.inner is None else self.inner(module, forward, (), call)
        except (RuntimeError, ValueError, IndexError) as error:
            if self.widening is None or isinstance(error, KitoutError) or is_out_of_memory(error):
                raise
            raise RouteError(
                f"{type(module).__name__} does not run on a text that a prompt has made longer: {error}. Use "
                "PrefixTuning, or the model without the inputs that this concerns"
            ) from error
        if self.prefill is not None:
            self.prefill.remember(out)
        for cache in (call.get("past_key_values"), out.get("past_key_values") if isinstance(out, Mapping) else None):
            if cache is not None:
                self.active.cache_prefix_lengths[cache] = lengths
        if self.widening is not None and not self.widening.read_by_decoder:
            out = trim_output(out, self.forward_slot.state, self.tower.path)
        return out

    def _lengths(self, rows: int) -> tuple[int, ...]:
        entries = [0] * rows if self.row_plan is None else self.row_plan.repeat_to(rows)
        return tuple(self.layouts[e].length for e in entries)

    def _check_cache(self, call: dict[str, Any], lengths: tuple[int, ...]) -> None:
        """RouteError where the cache was filled behind other prompts or prefixes: its keys have other positions."""
        cache = call.get("past_key_values")
        if cache is None:
            return
        before = self.active.cache_prefix_lengths.get(cache)
        if before not in (None, lengths) and int(cache.get_seq_length()) > 0:
            raise RouteError(
                f"this cache was filled with {list(before or ())} virtual tokens before its rows' texts, and the "
                f"active route has {list(lengths)}: continue under the route it was filled under, or start a new cache"
            )

    # ---- positions ---------------------------------------------------------------------------------------------

    def _set_positions(self, module: nn.Module, call: dict[str, Any], text: Tensor) -> None:
        """Keeps each query's position in its text, and gives the model the position ids that follow from it."""
        rows = text.shape[0]
        length = (call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]).shape[1]
        past = _num_cached_tokens(call)
        steps = torch.arange(length, device=text.device)[None] + past
        given, mask = call.get("position_ids"), call.get("attention_mask")
        counted = isinstance(given, Tensor) and given.ndim == 2
        if isinstance(given, Tensor) and counted:
            token_index = given
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            real = ((mask != 0).cumsum(-1) - 1).clamp_min(0)
            last = length if real.shape[1] == length else int(past) + length
            token_index = real[:, last - length : last]
        else:
            token_index = steps
        self.forward_slot.state.token_index[self.tower.path] = token_index
        known = length + past if isinstance(past, int) and not counted else None
        self.forward_slot.state.num_tokens[self.tower.path] = known
        are_the_callers = given is not None and not self.forward_slot.state.positions_from_generate
        if are_the_callers or not (self._has_shift or self.widening):
            return
        if given is not None and not counted and not self.passes_on:
            raise RouteError(
                f"position_ids of shape {list(given.shape)}: a prompt or prefix shifts positions along one axis, "
                "[batch, tokens], and this model has more"
            )
        if mask is None and any(i.after_first_token for layout in self.layouts for i in layout.items):
            # Without a mask a gap in the positions would pass for the start of another, packed text.
            call["attention_mask"] = torch.ones(rows, int(past) + length, dtype=torch.long, device=text.device)
        token_index, steps = token_index.expand(rows, -1), steps.expand(rows, -1)
        if self._is_one_shift and "position_ids" in parameter_names(type(module).forward):
            new = token_index + self.layouts[0].length
            self._check_limit(module, new, int(length + past))
            call["position_ids"] = new
            self.forward_slot.state.own_positions[self.tower.path] = new, token_index if counted else steps
            return
        shifts, moved = self._shifts(rows, text.device)
        before = torch.where(token_index > 0, shifts.sum(-1, keepdim=True), shifts[:, :1])
        new = token_index + before
        self._check_limit(module, new, int(length + past))
        if self.passes_on and not self.tower.position_embedding:

            def shift(position_ids: Tensor | None) -> Tensor:
                own = _own(position_ids, steps)
                shifted = torch.where(moved[:, None], _shifted(position_ids, new, before, steps), own)
                self.forward_slot.state.own_positions[self.tower.path] = shifted, own
                return shifted

            self.forward_slot.state.pending_rewrites[self.tower.block_runner] = shift
            return
        self._pass_positions(module, call, new, moved, token_index if counted else steps)

    @property
    def _is_one_shift(self) -> bool:
        """All positions of all rows move by the same, and the module that embeds is given them."""
        layout = self.layouts[0]
        if self.row_plan is not None or self.passes_on or self.tower.position_embedding or not fast.enabled():
            return False
        return layout.length > 0 and not any(item.after_first_token for item in layout.items)

    @property
    def _has_shift(self) -> bool:
        return any(layout.length for layout in self.layouts)

    def _shifts(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """By row: virtual tokens before the first token, and between it and the rest [B, 2]; whether it has any [B]."""
        entries = [0] * rows if self.row_plan is None else self.row_plan.repeat_to(rows)
        between = [sum(i.num_tokens for i in layout.items if i.after_first_token) for layout in self.layouts]
        wide = [0] * len(self.layouts) if self.widening is None else self.widening.lengths
        shifts = tuple((self.layouts[e].length - between[e], between[e]) for e in entries)
        moved = tuple(bool(self.layouts[e].length or wide[e]) for e in entries)
        return constant(shifts, device, torch.long), constant(moved, device, torch.bool)

    def _pass_positions(
        self, module: nn.Module, call: dict[str, Any], position_ids: Tensor, is_moved: Tensor, own_position_ids: Tensor
    ) -> None:
        """The rows that move get these positions, the others what the model makes of theirs."""
        if self.tower.position_embedding:
            shifted = position_ids + self.tower.offset

            def rewrite(indices: Tensor) -> Tensor:
                if indices.ndim == 1:  # one lookup for all rows
                    if bool((shifted != shifted[:1]).any()) or not bool(is_moved.all()):
                        raise RouteError(
                            f"{self.tower.position_embedding} is looked up once for all rows, and here they have "
                            "positions of their own: use one prompt or prefix for all rows, without padding at the left"
                        )
                    return shifted[0]
                return torch.where(is_moved[:, None], shifted, indices.expand(len(shifted), -1))

            self.forward_slot.state.pending_rewrites[self.tower.position_embedding] = rewrite
        elif "position_ids" in parameter_names(type(module).forward):
            call["position_ids"] = torch.where(is_moved[:, None], position_ids, own_position_ids)
            self.forward_slot.state.own_positions[self.tower.path] = call["position_ids"], own_position_ids
        elif not self.is_relative and bool((is_moved[:, None] & (position_ids != own_position_ids)).any()):
            raise RouteError(
                f"{type(module).__name__} counts its positions itself, where they cannot be shifted: text after a "
                "prompt or prefix would have the wrong ones"
            )

    def _check_limit(self, module: nn.Module, position_ids: Tensor, num_seen: int) -> None:
        """RouteError where a position is beyond those the model has."""
        max_positions = self.num_positions
        if max_positions is None:
            max_positions = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        max_virtual = max(layout.length for layout in self.layouts)
        if (
            not isinstance(max_positions, int)
            or num_seen + max_virtual <= max_positions
            or int(position_ids.max()) < max_positions
        ):
            return
        num_over = int(position_ids.max()) + 1 - max_positions
        num_virtual = max_virtual or max(self.widening.lengths if self.widening else [0])
        raise RouteError(
            f"prompt or prefix and text are {num_over} positions too long: {int(position_ids.max()) + 1} positions, "
            f"of which up to {num_virtual} are virtual tokens, and "
            f"the model has {max_positions}; shorten the text by {num_over}"
        )


def _own(position_ids: Tensor | None, steps: Tensor) -> Tensor:
    """The positions that a model gives to the one in it: none means one after the other."""
    return steps if position_ids is None else position_ids


def _shifted(position_ids: Tensor | None, new: Tensor, before: Tensor, steps: Tensor) -> Tensor:
    """The same for rows with virtual tokens, [B, T] or [axes, B, T]. new: counted from the mask, with those before."""
    if position_ids is None:
        return new
    start = position_ids - steps
    counts_pads = bool((start == start[..., :1]).all())  # from the left edge, not from the mask
    return start + new if counts_pads and position_ids.ndim == 2 else position_ids + before


class PositionIdsProgram:
    """The program of a module that is given positions by the model around it (several axes where there are images)."""

    def __init__(self, path: str, forward_slot: ForwardSlot, inner: Program | None) -> None:
        self.path, self.forward_slot, self.inner = path, forward_slot, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rewrite = self.forward_slot.state.pending_rewrites.pop(self.path, None)
        if rewrite is not None:
            call = arguments_by_name(forward, args, kwargs)
            args, kwargs = (), {**call, "position_ids": rewrite(call.get("position_ids"))}
        return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)


class TokenEmbeddingProgram:
    """The program of a token table whose output is rewritten where the sequence is widened."""

    def __init__(self, path: str, forward_slot: ForwardSlot, inner: Program | None) -> None:
        self.path, self.forward_slot, self.inner = path, forward_slot, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rewrite = self.forward_slot.state.pending_rewrites.pop(self.path, None)
        out = forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)
        return out if rewrite is None else rewrite(out)


class PositionEmbeddingProgram:
    """The program of a position table that some rows look up at shifted positions."""

    def __init__(self, path: str, forward_slot: ForwardSlot, inner: Program | None) -> None:
        self.path, self.forward_slot, self.inner = path, forward_slot, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rewrite = self.forward_slot.state.pending_rewrites.pop(self.path, None)
        if rewrite is not None and forward is not nn.Embedding.forward:  # it counts for itself before it looks up
            forward = partial(_call_rewritten, rewrite, forward)
        elif rewrite is not None:
            args, kwargs = replace_first_tensor(args, kwargs, rewrite(first_tensor(args, kwargs)))
        return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)


class OwnPositions:
    """The program of a block without attention: it sees no keys, so its text begins where it would begin alone.

    A recurrence may start anew at position 0, and must not miss its start behind a prefix.
    """

    def __init__(self, tower: str, forward_slot: ForwardSlot, inner: Program | None) -> None:
        self.tower, self.forward_slot, self.inner = tower, forward_slot, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = self.forward_slot.state.own_positions.get(self.tower)
        if positions is not None:
            shifted, own = positions
            args = tuple(own if value is shifted else value for value in args)
            kwargs = {name: own if value is shifted else value for name, value in kwargs.items()}
        return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)


def _call_rewritten(
    rewrite: Callable[[Tensor], Tensor], forward: ForwardFn, module: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    with _RewriteIndices(rewrite):
        return forward(module, *args, **kwargs)


class _RewriteIndices(TorchFunctionMode):
    """Rewrites the indices of table lookups."""

    def __init__(self, rewrite: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rewrite = rewrite

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            args = (self.rewrite(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def arguments_by_name(forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call by the names of its parameters."""
    return dict(zip(parameter_names(forward), args, strict=False)) | kwargs


@lru_cache(maxsize=256)
def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _num_cached_tokens(call: dict[str, Any]) -> Any:
    """How many of the row's tokens the cache holds: a number, or a tensor where the cache counts in one."""
    cache = call.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()
