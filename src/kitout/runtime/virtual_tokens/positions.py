"""The stage of one stack of blocks: what happens to a call where its tokens are turned into the stack's stream.

Positions: a row with a prefix or a prompt counts its text from its mask, after what lies in front. Prompts before
blocks that do not look ahead are run on their own (`lead.py`); before others the sequence is widened (`widen.py`). It
knows calls by the names transformers gives their arguments, and nothing of adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kitout.base.survey import Tower
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, Program, first_tensor, replace_first_tensor
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot
from kitout.runtime.virtual_tokens.layout import TokenLayout
from kitout.runtime.virtual_tokens.widen_sequence import SequenceWidener, trim_output


class PrefillRunner(Protocol):
    """Runs prompts ahead of the text (`lead.py`)."""

    def run(self, module: nn.Module, call: dict[str, Any], rows: int) -> None: ...
    def remember(self, call: dict[str, Any], output: Any) -> None: ...


class GenerationState(Protocol):
    """counts: `generate` gives the positions of a call, counted from the mask, and not its caller. fronts: by cache,
    how many positions were in front of each row's text when it was filled.
    """

    cache_prefix_lengths: WeakKeyDictionary[Any, tuple[int, ...]]

    @property
    def positions_from_generate(self) -> bool: ...


class TextEntry:
    """The program of the module that owns a stack. layouts: by entry, what lies in front of its text as keys and
    values. widening: what goes into the sequence itself, here; across: likewise in the stack that this one reads.
    """

    def __init__(
        self,
        tower: Tower,
        layouts: Sequence[TokenLayout],
        row_plan: RowPlan | None,
        forward_slot: ForwardSlot,
        active: GenerationState,
        prefill: PrefillRunner | None = None,
        widening: SequenceWidener | None = None,
        cross_widening: SequenceWidener | None = None,
        inner: Program | None = None,
        is_relative: bool = False,
    ) -> None:
        self.is_relative = is_relative  # positions are distances, which attention computes
        self.tower, self.layouts, self.row_plan, self.forward_slot, self.active = (
            tower,
            layouts,
            row_plan,
            forward_slot,
            active,
        )
        self.prefill, self.widening, self.cross_widening, self.inner = prefill, widening, cross_widening, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = arguments_by_name(forward, args, kwargs)
        text = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        if not isinstance(text, Tensor):
            return forward(module, *args, **kwargs)  # it says itself what it misses
        lengths = self._lengths(text.shape[0])
        self._check_cache(call, lengths)
        if self.cross_widening is not None:
            self.cross_widening.widen_mask(call, self.forward_slot.state)
        if self.widening is not None:
            if call.get("past_key_values") is not None:
                raise RouteError(
                    "a prompt among tokens that look ahead is part of every forward, and this one goes on from a "
                    "cache: call it without one (use_cache=False)"
                )
            self.widening.widen(module, call, self.forward_slot.state)
        self._set_positions(module, call, text)
        if self.prefill is not None:
            self.prefill.run(module, call, text.shape[0])
        out = forward(module, **call) if self.inner is None else self.inner(module, forward, (), call)
        if self.prefill is not None:
            self.prefill.remember(call, out)
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
                f"this cache was filled with {list(before or ())} positions in front of its rows' texts, and the route "
                f"now puts {list(lengths)} there: go on under the route it was filled under, or with a fresh cache"
            )

    # ---- positions ---------------------------------------------------------------------------------------------

    def _set_positions(self, module: nn.Module, call: dict[str, Any], text: Tensor) -> None:
        """Leaves each query's place in its text, and gives the model the positions that follow from it."""
        rows = text.shape[0]
        length = (call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]).shape[1]
        past = _num_cached_tokens(call)
        steps = torch.arange(length, device=text.device)[None] + past
        given, mask = call.get("position_ids"), call.get("attention_mask")
        counted = isinstance(given, Tensor) and given.ndim == 2
        if isinstance(given, Tensor) and counted:
            places = given
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            real = (mask.long().cumsum(-1) - 1).clamp_min(0)
            last = length if real.shape[1] == length else int(past) + length
            places = real[:, last - length : last]
        else:
            places = steps
        self.forward_slot.state.token_index[self.tower.path] = places
        if (given is not None and not self.active.positions_from_generate) or not (self._has_shift or self.widening):
            return
        if given is not None and not counted:
            raise RouteError(
                f"position_ids of shape {list(given.shape)}: a prompt or prefix shifts positions along one axis, "
                "[batch, tokens], and this model has more"
            )
        if mask is None and any(i.after_first_token for laid in self.layouts for i in laid.items):
            # Without a mask a gap in the positions would pass for the start of another, packed text.
            call["attention_mask"] = torch.ones(rows, int(past) + length, dtype=torch.long, device=text.device)
        places, steps = places.expand(rows, -1), steps.expand(rows, -1)
        shifts, moved = self._shifts(rows, text.device)
        before = torch.where(places > 0, shifts.sum(-1, keepdim=True), shifts[:, :1])
        new = places + before
        self._check_limit(module, new, int(length + past))
        self._pass_positions(module, call, new, moved, places if counted else steps)

    @property
    def _has_shift(self) -> bool:
        return any(laid.length for laid in self.layouts)

    def _shifts(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """By row, what lies before the first token and between it and the rest [B, 2]; whether its places move [B]."""
        entries = [0] * rows if self.row_plan is None else self.row_plan.repeat_to(rows)
        between = [sum(i.num_tokens for i in laid.items if i.after_first_token) for laid in self.layouts]
        wide = [0] * len(self.layouts) if self.widening is None else self.widening.lengths
        shifts = torch.tensor([[self.layouts[e].length - between[e], between[e]] for e in entries], device=device)
        moved = torch.tensor([bool(self.layouts[e].length or wide[e]) for e in entries], device=device)
        return shifts, moved

    def _pass_positions(
        self, module: nn.Module, call: dict[str, Any], position_ids: Tensor, is_moved: Tensor, own_position_ids: Tensor
    ) -> None:
        """The rows that move get these places, the others what the model makes of theirs."""
        if self.tower.position_embedding:
            wanted = position_ids + self.tower.offset

            def ask(indices: Tensor) -> Tensor:
                return torch.where(is_moved[:, None], wanted, indices.expand(len(wanted), -1))

            self.forward_slot.state.pending_rewrites[self.tower.position_embedding] = ask
        elif "position_ids" in _parameters(type(module).forward):
            call["position_ids"] = torch.where(is_moved[:, None], position_ids, own_position_ids)
        elif not self.is_relative and bool((is_moved[:, None] & (position_ids != own_position_ids)).any()):
            raise RouteError(
                f"{type(module).__name__} counts its positions itself, where they cannot be shifted: text after a "
                "prompt or prefix would have the wrong ones"
            )

    def _check_limit(self, module: nn.Module, position_ids: Tensor, num_seen: int) -> None:
        """RouteError where a position lies beyond what the model has a place for."""
        most = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        front = max(laid.length for laid in self.layouts)
        if not isinstance(most, int) or num_seen + front <= most or int(position_ids.max()) < most:
            return
        over = int(position_ids.max()) + 1 - most
        raise RouteError(
            f"prompt or prefix and text are {over} positions too long: {int(position_ids.max()) + 1} positions, "
            "of which up "
            f"to {front or max(self.widening.lengths if self.widening else [0])} lie in front of the text, and the "
            f"model has {most} (max_position_embeddings); shorten the text by {over}"
        )


class TokenEmbeddingProgram:
    """The program of a token table into whose answer a stage wants rows written."""

    def __init__(self, path: str, forward_slot: ForwardSlot, inner: Program | None) -> None:
        self.path, self.forward_slot, self.inner = path, forward_slot, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rewrite = self.forward_slot.state.pending_rewrites.pop(self.path, None)
        out = forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)
        return out if rewrite is None else rewrite(out)


class PositionEmbeddingProgram:
    """The program of a learned position table some of whose rows are asked for other places."""

    def __init__(self, path: str, forward_slot: ForwardSlot, inner: Program | None) -> None:
        self.path, self.forward_slot, self.inner = path, forward_slot, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ask = self.forward_slot.state.pending_rewrites.pop(self.path, None)
        if ask is not None and forward is not nn.Embedding.forward:  # it counts for itself before it looks up
            forward = partial(_call_rewritten, ask, forward)
        elif ask is not None:
            args, kwargs = replace_first_tensor(args, kwargs, ask(first_tensor(args, kwargs)))
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
    return dict(zip(_parameters(forward), args, strict=False)) | kwargs


@lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _num_cached_tokens(call: dict[str, Any]) -> Any:
    """How many of the row's tokens the cache holds: a number, or a tensor where the cache counts in one."""
    cache = call.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()
