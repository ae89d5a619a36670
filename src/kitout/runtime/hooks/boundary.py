"""The model boundary: where a route meets a call, and the block boundary: where recomputation finds it again.

At the top of the model the context's route is resolved once, checked against the batch and laid on the taps; inside
the graph only plain attributes are read. Blocks hand their route to activation checkpointing as one more keyword
argument, so a recomputation wears what its forward wore. It knows nothing of adapters or methods.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kitout.errors import MergeState, RouteError
from kitout.runtime.hooks.class_swap import subclass
from kitout.runtime.hooks.fires import Firing
from kitout.runtime.routing.active import Bound, Live
from kitout.runtime.state import KitState
from kitout.runtime.virtual_tokens.widen_sequence import trimmed

ROUTE = "_kitout_route"  # the keyword a block's route travels under
ENCODER = ("encoder_last_hidden_state", "encoder_hidden_states")


class Resolver(Protocol):
    """What the boundary asks of a kit."""

    state: KitState

    def train(self, mode: bool = True) -> Any: ...


@cache
def bounded(base: type[nn.Module]) -> type[nn.Module]:
    """The swapped class of the model itself."""
    frozen_forward = base.forward
    frozen_train = base.train
    members: dict[str, Any] = {"swap": bounded, "_kitout": None, "frozen_train": frozen_train}

    @wraps(frozen_forward)  # transformers reads the signature of a model's forward
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._kitout is None:
            return frozen_forward(self, *args, **kwargs)  # the taps already hold the route `use` laid
        state: KitState = self._kitout.state
        _check_trainable(state, self)
        live = state.live
        if live.leading:
            return frozen_forward(self, *args, **kwargs)
        with live.lock:
            live.settle()
            bound = state.resolve().begun()
            if bound.rows is not None and live.depth == 0:
                _check_rows(bound, self, args, kwargs, bool(live.generating))
            live.lay(bound)
            _check_cache(live, bound, kwargs)
            live.depth += 1
            try:
                with Firing(state) if state.unproven else nullcontext():
                    output = frozen_forward(self, *args, **kwargs)
            finally:
                live.depth -= 1
                _finish(live, bound)
            return _returned(live, bound, output)

    def train(self: Any, mode: bool = True) -> Any:
        if self._kitout is None:
            return frozen_train(self, mode)
        self._kitout.train(mode)  # the adapters' dropout follows the model's mode; trains this module in turn
        return self

    members["forward"], members["train"] = forward, train
    frozen_generate = getattr(base, "generate", None)
    if frozen_generate is not None:

        @wraps(frozen_generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self._kitout is None:
                return frozen_generate(self, *args, **kwargs)
            state: KitState = self._kitout.state
            live = state.live
            with live.lock:
                live.settle()
                bound = state.resolve().begun()
                if bound.rows is not None:
                    _check_rows(bound, self, args, kwargs, False)
                live.lay(bound)  # an encoder may be called before the model's own forward is
                live.generating += 1
                counting, live.counting = live.counting, kwargs.get("position_ids") is None
                try:
                    return frozen_generate(self, *args, **kwargs)
                finally:
                    live.generating -= 1
                    live.counting = counting
                    _finish(live, bound)

        members["generate"] = generate
    return subclass(base, members)


@cache
def routed(base: type[nn.Module]) -> type[nn.Module]:
    """The swapped class of a block: a tap that also carries its route through activation checkpointing."""
    frozen_forward = base.forward

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        live: Live | None = self._kitout_live
        if live and live.leading and getattr(self, "gradient_checkpointing", False):
            self.gradient_checkpointing = False  # a prompt is short, and its keys are wanted in this very graph
            try:
                return base.__call__(self, *args, **kwargs)
            finally:
                self.gradient_checkpointing = True
        if live and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            known = live.depth or torch._C._current_graph_task_id() == -1  # else the route of some later forward
            if known and live.bound.items and getattr(self, "gradient_checkpointing", False):
                kwargs[ROUTE] = live.bound
        return base.__call__(self, *args, **kwargs)

    @wraps(frozen_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = kwargs.pop(ROUTE, None)
        live: Live | None = self._kitout_live
        if live is None:
            return frozen_forward(self, *args, **kwargs)
        if bound is None and _recomputing(live):
            bound = live.graphs.recomputed()
        if bound is None or (live.depth and bound is live.bound):
            return run(self, args, kwargs)
        with live.reentered(bound):
            return run(self, args, kwargs)

    def run(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self._kitout_tap.program
        if program is None:
            return frozen_forward(self, *args, **kwargs)
        return program(self, frozen_forward, args, kwargs)

    members = {"__call__": call, "forward": forward, "frozen_forward": frozen_forward, "_kitout_live": None}
    return subclass(base, {"swap": routed, **members})


def _returned(live: Live, bound: Bound, output: Any) -> Any:
    """The output as the caller knows it, and on record for recomputations."""
    if bound.call.slotted is not None:
        output = bound.call.slotted(output)
    for tower in bound.call.back:  # states of an encoder come back as wide as its decoder read them
        output = trimmed(output, bound.call, tower, ENCODER)
    if torch.is_grad_enabled():
        live.graphs.record(output, bound)
    return output


def _check_cache(live: Live, bound: Bound, kwargs: dict[str, Any]) -> None:
    """RouteError where a cache was filled behind prompts or prefixes and nothing of the kind is worn now."""
    cache = kwargs.get("past_key_values")
    if bound.here is None and cache is not None and any(live.fronts.get(cache, ())) and int(cache.get_seq_length()):
        raise RouteError(
            f"this cache was filled behind {max(live.fronts[cache])} positions of a prompt or prefix, and none is worn "
            "now: go on under the route it was filled under, or with a fresh cache"
        )


def _check_trainable(state: KitState, model: nn.Module) -> None:
    """Training while merged would train nothing: the adapter is no longer in the graph."""
    if state.merged_names and model.training and torch.is_grad_enabled():
        raise MergeState(
            f"{state.merged_text} merged into the base, so a training forward would reach no adapter: unmerge() "
            "first, or run under model.eval() or torch.no_grad()"
        )


def _finish(live: Live, bound: Bound) -> None:
    """A call is over: whatever runs outside of one has the rows the route names."""
    if bound.plan is not None and not (live.depth or live.generating):
        bound.plan.batch = bound.plan.size


def _recomputing(live: Live) -> bool:
    """True in a block that runs inside a backward pass without having come through the model boundary."""
    if torch.compiler.is_compiling() or live.depth:
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def _check_rows(bound: Bound, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], multiples: bool) -> None:
    """The route names as many rows as the call has (inside generate, beams make it a multiple)."""
    rows, batch = bound.rows or 1, _batch_size(model, args, kwargs)
    if batch == rows or (multiples and batch % rows == 0):
        if bound.plan is not None:
            bound.plan.batch = batch
        return
    raise RouteError(
        f"the route names {rows} rows but this call has a batch of {batch}: use([...]) takes one entry per row, in "
        "order, None for base rows"
    )


def _batch_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of a call: dim 0 of its main input, else of the first tensor in it."""
    main = kwargs.get(getattr(model, "main_input_name", "input_ids"))
    values = [main, *args, *kwargs.values()]
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0]
    raise RouteError("the route names rows, but this call has no tensor to count them by")
