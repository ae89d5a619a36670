"""Prompts before blocks that do not look ahead: run once, ahead of the text, and kept as their keys and values.

Nothing in the text can change what such a prompt computes, so it is run alone, once per entry and not once per row,
and the text then sees its keys as it would a prefix: no sequence is widened, no label or mask is touched, every kind of
cache and of `generate` works as without. Where a decoder reads an encoder, or the prompt comes after the first token,
it is run once per row. Kept as long as the cache of the text that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kitout.delta import KeyValue
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, Program, first_tensor, replace_first_tensor
from kitout.runtime.modules.module_adapter import SiteDelta
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.routing.active import ActiveRoute, CompiledRoute
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot, ForwardState

PromptKeyValues = dict[str, list[KeyValue | None]]


@dataclass
class PromptEntry:
    """One entry's prompts and what they are run under: the entry without them, with recorders at the attentions."""

    parts: Sequence[SiteDelta]
    compiled: CompiledRoute
    key_values: dict[str, KeyValue]

    @property
    def after_first_token(self) -> bool:
        return any(p.delta.after_first_token for p in self.parts)


class PromptPrefill:
    """Runs the prompts of a route's entries (None: an entry without) at one stack."""

    def __init__(
        self,
        tower: str,
        table: nn.Module,
        blocks: Sequence[nn.Module],
        entries: Sequence[PromptEntry | None],
        row_plan: RowPlan | None,
        forward_slot: ForwardSlot,
        active: ActiveRoute,
    ) -> None:
        self.tower, self.table, self.blocks, self.entries = tower, table, blocks, entries
        self.row_plan, self.forward_slot, self.active = row_plan, forward_slot, active
        self._by_cache: WeakKeyDictionary[Any, PromptKeyValues] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:  # caches of texts in progress do not travel
        return {**self.__dict__, "_by_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _by_cache=WeakKeyDictionary())

    def run(self, module: nn.Module, call: dict[str, Any], rows: int) -> None:
        """Leaves the keys and values of every entry's prompts in the Call."""
        here = self.forward_slot.state
        cache = call.get("past_key_values")
        begun = cache is not None and int(cache.get_seq_length()) > 0
        leads = (
            self._by_cache[cache]
            if begun and cache in self._by_cache
            else self._run_prompts(module, self._detach_encoder(call), rows, begun)
        )
        self._check_rows(leads, rows)
        here.prompt_kv |= leads
        here.has_graph = self._will_recompute() and any(
            t.requires_grad for each in leads.values() for pair in each if pair for t in pair
        )
        here.prompt_kv_leaves |= (
            {path: [_detach_leaf(pair) for pair in each] for path, each in leads.items()} if here.has_graph else leads
        )
        here.last_prompt_kv = leads
        if cache is not None:
            self._by_cache[cache] = leads

    def _check_rows(self, prefill: PromptKeyValues, rows: int) -> None:
        """RouteError where kept keys are not those of as many rows: the cache's rows were chosen anew."""
        entries = [0] * rows if self.row_plan is None else self.row_plan.repeat_to(rows)
        for each in prefill.values():
            for e, pair in enumerate(each):
                if pair is not None and pair[0].shape[0] not in (1, entries.count(e)):
                    raise RouteError(
                        f"the prompt was run for {pair[0].shape[0]} rows and {entries.count(e)} wear it in this call: "
                        "after choosing rows of a cache anew, start with a fresh one"
                    )

    def remember(self, call: dict[str, Any], output: Any) -> None:
        """The cache that the model made itself goes with these keys as well."""
        cache = output.get("past_key_values") if isinstance(output, Mapping) else None
        if cache is not None:
            self._by_cache[cache] = self.forward_slot.state.last_prompt_kv

    def _will_recompute(self) -> bool:
        """Whether this forward's blocks will be run again in its backward."""
        checkpointed = any(b.training and getattr(b, "gradient_checkpointing", False) for b in self.blocks)
        return checkpointed and torch.is_grad_enabled()

    def _detach_encoder(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call for the prompts alone. Where blocks are recomputed, an encoder's states get there as a leaf: their
        own graph may then be run backward once, for prompts and text together.
        """
        states = call.get("encoder_hidden_states")
        if not (isinstance(states, Tensor) and states.requires_grad and self._will_recompute()):
            return call
        leaf = states.detach().requires_grad_()
        call["encoder_hidden_states"] = _JoinGraphs.apply(states, [leaf], states)
        return {**call, "encoder_hidden_states": leaf}

    def _run_prompts(self, module: nn.Module, call: dict[str, Any], rows: int, begun: bool) -> PromptKeyValues:
        before = self.active.installed
        index = None if self.row_plan is None else self.row_plan.index(rows, self._device)
        leads: PromptKeyValues = {}
        try:
            for e, ahead in enumerate(self.entries):
                if ahead is None:
                    continue
                where = None if index is None else index[e]
                ahead.key_values.clear()
                self.active.install(replace(ahead.compiled, forward_state=ForwardState()))
                self.active.prefilling += 1
                drops, training = getattr(module, "layerdrop", 0), module.training
                module.training = training and not drops  # every block's keys are wanted
                try:
                    module(**self._inputs(module, call, ahead, where, begun))
                finally:
                    module.training = training
                    self.active.prefilling -= 1
                skip = 1 if ahead.after_first_token else 0
                for path, (k, v) in ahead.key_values.items():
                    each = leads.setdefault(path, [None] * len(self.entries))
                    each[e] = k[:, :, skip:], v[:, :, skip:]
                ahead.key_values.clear()
        finally:
            self.active.install(before)
        return leads

    @property
    def _device(self) -> torch.device:
        return next(self.table.parameters()).device

    def _inputs(
        self, module: nn.Module, call: dict[str, Any], prompt_entry: PromptEntry, row_index: Tensor | None, begun: bool
    ) -> dict[str, Any]:
        like = next(p for p in module.parameters() if p.is_floating_point())
        vectors = torch.cat([p.delta.token_vectors() for p in prompt_entry.parts]).to(like.device, like.dtype)[None]
        inputs: dict[str, Any] = {"use_cache": False}
        states = call.get("encoder_hidden_states")
        if isinstance(states, Tensor):
            inputs["encoder_hidden_states"] = states if row_index is None else states[row_index]
            mask = call.get("encoder_attention_mask")
            if isinstance(mask, Tensor):
                inputs["encoder_attention_mask"] = mask if row_index is None else mask[row_index]
        first = self._first_token(call, row_index, begun) if prompt_entry.after_first_token else None
        rows = [t.shape[0] for t in (inputs.get("encoder_hidden_states"), first) if t is not None]
        vectors = vectors.expand(max(rows, default=1), -1, -1)
        if first is not None:
            vectors = torch.cat((first.to(vectors.dtype).expand(len(vectors), -1, -1), vectors), 1)
        return {**inputs, "inputs_embeds": vectors}

    def _first_token(self, call: dict[str, Any], row_index: Tensor | None, begun: bool) -> Tensor:
        """The embedding of each row's first token [b or 1, 1, d], one for all where they are the same."""
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        if begun or ids is None:
            raise RouteError(
                "a prompt after the first token needs that token: give input_ids, and go on with the cache that the "
                "forward of the first tokens filled"
            )
        places = self.forward_slot.state.token_index[self.tower].expand(len(ids), -1)
        start = (places == 0).sum(1, keepdim=True) - 1  # pads before the first token count as its place
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, : ids.shape[1]].any(1).all()):
            raise RouteError("a prompt after the first token needs that token, and the tokens of a row are pads alone")
        first = ids.gather(1, start)
        first = first if row_index is None else first[row_index]
        if bool((first == first[:1]).all()):
            first = first[:1]
        embedded: Tensor = self.table(first)
        return embedded


def _detach_leaf(pair: KeyValue | None) -> KeyValue | None:
    if pair is None:
        return None
    k, v = (t.detach().requires_grad_() for t in pair)
    return k, v


class _JoinGraphs(torch.autograd.Function):
    """The identity on x whose backward hands the leaves' gradients on to what they were cut from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaves: list[Tensor], *_values: Tensor) -> Tensor:
        ctx.leaves = leaves
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        given = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return (grad, None, *given)


class JoinPromptGraph:
    """The program of a stack's first block. Reentrant checkpointing runs each block backward in a graph of its own;
    a prompt's graph, which all of them reach, is then run once, after the last.
    """

    def __init__(self, paths: Sequence[str], forward_slot: ForwardSlot, inner: Program | None) -> None:
        self.paths, self.forward_slot, self.inner = paths, forward_slot, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.forward_slot.state
        if call.has_graph and not torch.is_grad_enabled():
            call.reentrant = True
        if call.reentrant and torch.is_grad_enabled():
            args, kwargs = replace_first_tensor(args, kwargs, self._join(first_tensor(args, kwargs), call))
        return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)

    def _join(self, x: Tensor, forward_state: ForwardState) -> Tensor:
        values, leaves = [], []
        for path in self.paths:
            for pair, cut in zip(
                forward_state.prompt_kv.get(path, ()), forward_state.prompt_kv_leaves.get(path, ()), strict=True
            ):
                if pair is not None and cut is not None:
                    values += list(pair)
                    leaves += list(cut)
        return _JoinGraphs.apply(x, leaves, *values)
