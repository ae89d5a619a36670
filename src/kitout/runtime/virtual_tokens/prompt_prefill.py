"""Prompts before causal blocks: run once, before the text, and kept as their keys and values.

Nothing in the text can change what such a prompt computes. So it is run alone, once per entry and not once per row,
and the text sees its keys as it would see a prefix: no sequence is widened, no label or mask is touched, every kind of
cache and of `generate` works as without. Where a decoder reads an encoder, or the prompt comes after the first token,
it is run once per row. Kept as long as the cache of the text that follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kitout.base.memory import is_out_of_memory
from kitout.delta import KeyValue
from kitout.errors import KitoutError, RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, Program, first_tensor, replace_first_tensor
from kitout.runtime.modules.module_adapter import SiteDelta
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.routing.active import ActiveRoute, CompiledRoute
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot, ForwardState

PromptKeyValues = dict[str, list[KeyValue | None]]


@dataclass
class PromptEntry:
    """One entry's prompts."""

    parts: Sequence[SiteDelta]
    """The prompts, in order."""
    compiled: CompiledRoute
    """What they are run under: the entry without them, with recorders at the attentions."""
    key_values: dict[str, KeyValue]
    """What the recorders write to, by path."""
    start: int = 0
    """Position of the first of them: after the entry's prefixes."""

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
        runner: nn.Module | None = None,
        reads_ids: bool = False,
    ) -> None:
        self.tower, self.table, self.blocks, self.entries = tower, table, blocks, entries
        self.runner, self.reads_ids = runner, reads_ids
        self.row_plan, self.forward_slot, self.active = row_plan, forward_slot, active
        self._by_cache: WeakKeyDictionary[Any, PromptKeyValues] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:  # caches of texts in progress are not copied
        return {**self.__dict__, "_by_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _by_cache=WeakKeyDictionary())

    def run(self, module: nn.Module, call: dict[str, Any], rows: int) -> dict[str, Any]:
        """Leaves the keys and values of every entry's prompts in the forward's state; returns the text's call."""
        state = self.forward_slot.state
        cache = call.get("past_key_values")
        begun = cache is not None and int(cache.get_seq_length()) > 0
        if begun and cache in self._by_cache:
            prompt_kv = self._by_cache[cache]
        else:
            prompt_call, call = self._split_call(call)
            prompt_kv = self._prefill_all(module, prompt_call, rows, begun)
        self._check_rows(prompt_kv, rows)
        state.prompt_kv |= prompt_kv
        state.has_graph = self._will_recompute() and any(
            t.requires_grad for by_entry in prompt_kv.values() for pair in by_entry if pair for t in pair
        )
        state.prompt_kv_leaves |= (
            {path: [_detach_leaf(pair) for pair in by_entry] for path, by_entry in prompt_kv.items()}
            if state.has_graph
            else prompt_kv
        )
        state.last_prompt_kv = prompt_kv
        if cache is not None:
            self._by_cache[cache] = prompt_kv
        return call

    def run_alone(self, module: nn.Module) -> dict[str, KeyValue]:
        """The keys and values of the only entry's prompts alone, by attention path, each [1, H_kv, T, d_h]."""
        (entry,) = self.entries
        assert entry is not None
        return self._prefill(module, {}, entry, None, False)

    def remember(self, output: Any) -> None:
        """The cache that the model made itself goes with these keys as well."""
        cache = output.get("past_key_values") if isinstance(output, Mapping) else None
        if cache is not None:
            self._by_cache[cache] = self.forward_slot.state.last_prompt_kv

    def _check_rows(self, prompt_kv: PromptKeyValues, rows: int) -> None:
        """RouteError where kept keys are not those of as many rows: the cache's rows were selected anew."""
        entries = [0] * rows if self.row_plan is None else self.row_plan.repeat_to(rows)
        for by_entry in prompt_kv.values():
            for e, pair in enumerate(by_entry):
                if pair is not None and pair[0].shape[0] not in (1, entries.count(e)):
                    raise RouteError(
                        f"the prompt was run for {pair[0].shape[0]} rows, and it is active in {entries.count(e)} rows "
                        "of this call: after selecting rows of a cache, start with a new one"
                    )

    def _will_recompute(self) -> bool:
        """Whether this forward's blocks will be run again in its backward."""
        checkpointed = any(b.training and getattr(b, "gradient_checkpointing", False) for b in self.blocks)
        return checkpointed and torch.is_grad_enabled()

    def _split_call(self, call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The call for the prompts alone, and that for the text.

        Where blocks are recomputed, the prompts get an encoder's states as a leaf: their graph may then be run
        backward once, for prompts and text together.
        """
        states = call.get("encoder_hidden_states")
        if not (isinstance(states, Tensor) and states.requires_grad and self._will_recompute()):
            return call, call
        leaf = states.detach().requires_grad_()
        joined = _JoinGraphs.apply(states, [leaf], states)
        return {**call, "encoder_hidden_states": leaf}, {**call, "encoder_hidden_states": joined}

    def _prefill_all(self, module: nn.Module, call: dict[str, Any], rows: int, begun: bool) -> PromptKeyValues:
        """The keys and values of all entries."""
        index = None if self.row_plan is None else self.row_plan.index(rows, next(self.table.parameters()).device)
        prompt_kv: PromptKeyValues = {}
        for e, entry in enumerate(self.entries):
            if entry is None:
                continue
            key_values = self._prefill(module, call, entry, None if index is None else index[e], begun)
            for path, pair in key_values.items():
                prompt_kv.setdefault(path, [None] * len(self.entries))[e] = pair
        return prompt_kv

    def _prefill(
        self, module: nn.Module, call: dict[str, Any], entry: PromptEntry, row_index: Tensor | None, begun: bool
    ) -> dict[str, KeyValue]:
        """The keys and values of one entry's prompts, by the path of the attention."""
        entry.key_values.clear()
        with (
            self.active.prefill(replace(entry.compiled, forward_state=ForwardState())),
            _without_layer_drop(module),
        ):
            inputs = self._inputs(module, call, entry, row_index, begun)
            try:
                self._run(module, entry, inputs)
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
                if isinstance(error, KitoutError) or is_out_of_memory(error):
                    raise
                raise RouteError(
                    f"{type(self.runner or module).__name__} does not run a prompt by itself: {type(error).__name__}: "
                    f"{error}. Use PrefixTuning here"
                ) from error
        skip = 1 if entry.after_first_token else 0
        key_values = {path: (k[:, :, skip:], v[:, :, skip:]) for path, (k, v) in entry.key_values.items()}
        entry.key_values.clear()
        return key_values

    def _run(self, module: nn.Module, entry: PromptEntry, inputs: dict[str, Any]) -> None:
        """Runs the prompts through the module that embeds, or through the one in it that takes vectors."""
        if self.reads_ids:
            vectors = inputs.pop("inputs_embeds")
            pad_token_id = getattr(getattr(module, "config", None), "pad_token_id", None) or 0
            ids = torch.full(vectors.shape[:2], pad_token_id, dtype=torch.long, device=vectors.device)
            with _looked_up(self.table, vectors):
                module(input_ids=ids, **inputs)
        elif self.runner is None:
            module(**inputs)
        else:
            if entry.start:
                positions = torch.arange(inputs["inputs_embeds"].shape[1], device=inputs["inputs_embeds"].device)
                inputs["position_ids"] = positions[None] + entry.start
            self.runner(**inputs)

    def _inputs(
        self, module: nn.Module, call: dict[str, Any], entry: PromptEntry, row_index: Tensor | None, begun: bool
    ) -> dict[str, Any]:
        like = next(p for p in module.parameters() if p.is_floating_point())
        vectors = torch.cat([p.delta.token_vectors() for p in entry.parts]).to(like.device, like.dtype)[None]
        inputs: dict[str, Any] = {"use_cache": False}
        states = call.get("encoder_hidden_states")
        if isinstance(states, Tensor):
            inputs["encoder_hidden_states"] = states if row_index is None else states[row_index]
            mask = call.get("encoder_attention_mask")
            if isinstance(mask, Tensor):
                inputs["encoder_attention_mask"] = mask if row_index is None else mask[row_index]
        first = self._first_token(call, row_index, begun) if entry.after_first_token else None
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
                "a prompt after the first token needs that token: give input_ids, and continue with the cache that "
                "the forward of the first tokens filled"
            )
        token_index = self.forward_slot.state.token_index[self.tower].expand(len(ids), -1)
        start = (token_index == 0).sum(1, keepdim=True) - 1  # pads before the first token have its position
        first = ids.gather(1, start)
        first = first if row_index is None else first[row_index]
        answers = [(first == first[:1]).all()]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            answers.append(mask[:, : ids.shape[1]].any(1).all())
        are_same, *has_tokens = torch.stack(answers).tolist()  # both at once: a GPU is waited for
        if not all(has_tokens):
            raise RouteError("a prompt after the first token needs that token, and a row of this call is all padding")
        if are_same:
            first = first[:1]
        embedded: Tensor = self.table(first)
        return embedded


@contextmanager
def _looked_up(table: nn.Module, vectors: Tensor) -> Iterator[None]:
    """While this lasts, the token table returns these vectors."""
    handle = table.register_forward_hook(lambda *_: vectors)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without_layer_drop(module: nn.Module) -> Iterator[None]:
    """Runs a stack with all of its blocks: the keys of every one are wanted."""
    training = module.training
    module.training = training and not getattr(module, "layerdrop", 0)
    try:
        yield
    finally:
        module.training = training


def _detach_leaf(pair: KeyValue | None) -> KeyValue | None:
    if pair is None:
        return None
    k, v = (t.detach().requires_grad_() for t in pair)
    return k, v


class _JoinGraphs(torch.autograd.Function):
    """The identity on x; its backward hands the leaves' gradients on to what they were detached from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaves: list[Tensor], *_values: Tensor) -> Tensor:
        ctx.leaves = leaves
        return x.clone()  # no view: a block may write to its input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return (grad, None, *gradients)


class JoinPromptGraph:
    """The program of a stack's first block.

    Reentrant checkpointing runs each block backward in a graph of its own; a prompt's graph, which all of them reach,
    is then run once, after the last.
    """

    def __init__(self, paths: Sequence[str], forward_slot: ForwardSlot, inner: Program | None) -> None:
        self.paths, self.forward_slot, self.inner = paths, forward_slot, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.forward_slot.state
        if state.has_graph and not torch.is_grad_enabled():
            state.reentrant = True
        if state.reentrant and torch.is_grad_enabled():
            args, kwargs = replace_first_tensor(args, kwargs, self._join(first_tensor(args, kwargs), state))
        return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)

    def _join(self, x: Tensor, forward_state: ForwardState) -> Tensor:
        values, leaves = [], []
        for path in self.paths:
            pairs, leaf_pairs = (d.get(path, ()) for d in (forward_state.prompt_kv, forward_state.prompt_kv_leaves))
            for pair, leaf_pair in zip(pairs, leaf_pairs, strict=True):
                if pair is not None and leaf_pair is not None:
                    values += list(pair)
                    leaves += list(leaf_pair)
        return _JoinGraphs.apply(x, leaves, *values)
