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

from kitout.delta import Pair
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import Forward, Program, first_tensor, with_first
from kitout.runtime.modules.module_adapter import Part
from kitout.runtime.modules.rows import Plan
from kitout.runtime.routing.active import Bound, Live
from kitout.runtime.virtual_tokens.forward_state import Call, Here

Leads = dict[str, list[Pair | None]]


@dataclass
class Ahead:
    """One entry's prompts and what they are run under: the entry without them, with recorders at the attentions."""

    parts: Sequence[Part]
    bound: Bound
    found: dict[str, Pair]

    @property
    def after(self) -> bool:
        return any(p.delta.after for p in self.parts)


class Lead:
    """Runs the prompts of a route's entries (None: an entry without) at one stack."""

    def __init__(
        self,
        tower: str,
        table: nn.Module,
        blocks: Sequence[nn.Module],
        entries: Sequence[Ahead | None],
        plan: Plan | None,
        here: Here,
        live: Live,
    ) -> None:
        self.tower, self.table, self.blocks, self.entries = tower, table, blocks, entries
        self.plan, self.here, self.live = plan, here, live
        self._kept: WeakKeyDictionary[Any, Leads] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:  # caches of texts in progress do not travel
        return {**self.__dict__, "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=WeakKeyDictionary())

    def run(self, module: nn.Module, call: dict[str, Any], rows: int) -> None:
        """Leaves the keys and values of every entry's prompts in the Call."""
        here = self.here.call
        cache = call.get("past_key_values")
        begun = cache is not None and int(cache.get_seq_length()) > 0
        leads = (
            self._kept[cache] if begun and cache in self._kept else self._ahead(module, self._apart(call), rows, begun)
        )
        self._check_rows(leads, rows)
        here.leads |= leads
        here.recorded = self._recomputed() and any(
            t.requires_grad for each in leads.values() for pair in each if pair for t in pair
        )
        here.leaves |= (
            {path: [_leaf(pair) for pair in each] for path, each in leads.items()} if here.recorded else leads
        )
        here.latest = leads
        if cache is not None:
            self._kept[cache] = leads

    def _check_rows(self, leads: Leads, rows: int) -> None:
        """RouteError where kept keys are not those of as many rows: the cache's rows were chosen anew."""
        entries = [0] * rows if self.plan is None else self.plan.expanded(rows)
        for each in leads.values():
            for e, pair in enumerate(each):
                if pair is not None and pair[0].shape[0] not in (1, entries.count(e)):
                    raise RouteError(
                        f"the prompt was run for {pair[0].shape[0]} rows and {entries.count(e)} wear it in this call: "
                        "after choosing rows of a cache anew, start with a fresh one"
                    )

    def keep(self, call: dict[str, Any], output: Any) -> None:
        """The cache that the model made itself goes with these keys as well."""
        cache = output.get("past_key_values") if isinstance(output, Mapping) else None
        if cache is not None:
            self._kept[cache] = self.here.call.latest

    def _recomputed(self) -> bool:
        """Whether this forward's blocks will be run again in its backward."""
        checkpointed = any(b.training and getattr(b, "gradient_checkpointing", False) for b in self.blocks)
        return checkpointed and torch.is_grad_enabled()

    def _apart(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call for the prompts alone. Where blocks are recomputed, an encoder's states get there as a leaf: their
        own graph may then be run backward once, for prompts and text together.
        """
        states = call.get("encoder_hidden_states")
        if not (isinstance(states, Tensor) and states.requires_grad and self._recomputed()):
            return call
        leaf = states.detach().requires_grad_()
        call["encoder_hidden_states"] = _Join.apply(states, [leaf], states)
        return {**call, "encoder_hidden_states": leaf}

    def _ahead(self, module: nn.Module, call: dict[str, Any], rows: int, begun: bool) -> Leads:
        before = self.live.bound
        index = None if self.plan is None else self.plan.index(rows, self._device)
        leads: Leads = {}
        try:
            for e, ahead in enumerate(self.entries):
                if ahead is None:
                    continue
                where = None if index is None else index[e]
                ahead.found.clear()
                self.live.lay(replace(ahead.bound, call=Call()))
                self.live.leading += 1
                drops, training = getattr(module, "layerdrop", 0), module.training
                module.training = training and not drops  # every block's keys are wanted
                try:
                    module(**self._inputs(module, call, ahead, where, begun))
                finally:
                    module.training = training
                    self.live.leading -= 1
                skip = 1 if ahead.after else 0
                for path, (k, v) in ahead.found.items():
                    each = leads.setdefault(path, [None] * len(self.entries))
                    each[e] = k[:, :, skip:], v[:, :, skip:]
                ahead.found.clear()
        finally:
            self.live.lay(before)
        return leads

    @property
    def _device(self) -> torch.device:
        return next(self.table.parameters()).device

    def _inputs(
        self, module: nn.Module, call: dict[str, Any], ahead: Ahead, where: Tensor | None, begun: bool
    ) -> dict[str, Any]:
        like = next(p for p in module.parameters() if p.is_floating_point())
        vectors = torch.cat([p.delta.tokens() for p in ahead.parts]).to(like.device, like.dtype)[None]
        inputs: dict[str, Any] = {"use_cache": False}
        states = call.get("encoder_hidden_states")
        if isinstance(states, Tensor):
            inputs["encoder_hidden_states"] = states if where is None else states[where]
            mask = call.get("encoder_attention_mask")
            if isinstance(mask, Tensor):
                inputs["encoder_attention_mask"] = mask if where is None else mask[where]
        first = self._first(call, where, begun) if ahead.after else None
        rows = [t.shape[0] for t in (inputs.get("encoder_hidden_states"), first) if t is not None]
        vectors = vectors.expand(max(rows, default=1), -1, -1)
        if first is not None:
            vectors = torch.cat((first.to(vectors.dtype).expand(len(vectors), -1, -1), vectors), 1)
        return {**inputs, "inputs_embeds": vectors}

    def _first(self, call: dict[str, Any], where: Tensor | None, begun: bool) -> Tensor:
        """The embedding of each row's first token [b or 1, 1, d], one for all where they are the same."""
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        if begun or ids is None:
            raise RouteError(
                "a prompt after the first token needs that token: give input_ids, and go on with the cache that the "
                "forward of the first tokens filled"
            )
        places = self.here.call.places[self.tower].expand(len(ids), -1)
        start = (places == 0).sum(1, keepdim=True) - 1  # pads before the first token count as its place
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, : ids.shape[1]].any(1).all()):
            raise RouteError("a prompt after the first token needs that token, and the tokens of a row are pads alone")
        first = ids.gather(1, start)
        first = first if where is None else first[where]
        if bool((first == first[:1]).all()):
            first = first[:1]
        embedded: Tensor = self.table(first)
        return embedded


def _leaf(pair: Pair | None) -> Pair | None:
    if pair is None:
        return None
    k, v = (t.detach().requires_grad_() for t in pair)
    return k, v


class _Join(torch.autograd.Function):
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


class Joint:
    """The program of a stack's first block. Reentrant checkpointing runs each block backward in a graph of its own;
    a prompt's graph, which all of them reach, is then run once, after the last.
    """

    def __init__(self, paths: Sequence[str], here: Here, then: Program | None) -> None:
        self.paths, self.here, self.then = paths, here, then

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.here.call
        if call.recorded and not torch.is_grad_enabled():
            call.cut = True
        if call.cut and torch.is_grad_enabled():
            args, kwargs = with_first(args, kwargs, self._joined(first_tensor(args, kwargs), call))
        return forward(module, *args, **kwargs) if self.then is None else self.then(module, forward, args, kwargs)

    def _joined(self, x: Tensor, call: Call) -> Tensor:
        values, leaves = [], []
        for path in self.paths:
            for pair, cut in zip(call.leads.get(path, ()), call.leaves.get(path, ()), strict=True):
                if pair is not None and cut is not None:
                    values += list(pair)
                    leaves += list(cut)
        return _Join.apply(x, leaves, *values)
