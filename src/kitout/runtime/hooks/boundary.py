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

from kitout.errors import MergeStateError, RouteError
from kitout.runtime.hooks.class_swap import same_named_subclass
from kitout.runtime.hooks.fires import UnusedSiteCheck
from kitout.runtime.routing.active import ActiveRoute, CompiledRoute
from kitout.runtime.state import KitState
from kitout.runtime.virtual_tokens.widen_sequence import trim_output

ROUTE = "_kitout_route"  # the keyword a block's route travels under
ENCODER = ("encoder_last_hidden_state", "encoder_hidden_states")


class RouteSource(Protocol):
    """What the boundary asks of a kit."""

    state: KitState

    def train(self, mode: bool = True) -> Any: ...


@cache
def model_class(base: type[nn.Module]) -> type[nn.Module]:
    """The swapped class of the model itself."""
    frozen_forward = base.forward
    frozen_train = base.train
    members: dict[str, Any] = {"swap": model_class, "_kitout": None, "frozen_train": frozen_train}

    @wraps(frozen_forward)  # transformers reads the signature of a model's forward
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._kitout is None:
            return frozen_forward(self, *args, **kwargs)  # the taps already hold the route `use` laid
        state: KitState = self._kitout.state
        _check_trainable(state, self)
        live = state.active
        if live.prefilling:
            return frozen_forward(self, *args, **kwargs)
        with live.lock:
            live.make_sticky()
            bound = state.compiled_route().for_new_forward()
            if bound.num_rows is not None and live.depth == 0:
                _check_rows(bound, self, args, kwargs, bool(live.generating))
            live.install(bound)
            _check_cache(live, bound, kwargs)
            live.depth += 1
            try:
                with UnusedSiteCheck(state) if state.unproven else nullcontext():
                    output = frozen_forward(self, *args, **kwargs)
            finally:
                live.depth -= 1
                _finish(live, bound)
            return _finish_output(live, bound, output)

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
            live = state.active
            with live.lock:
                live.make_sticky()
                bound = state.compiled_route().for_new_forward()
                if bound.num_rows is not None:
                    _check_rows(bound, self, args, kwargs, False)
                live.install(bound)  # an encoder may be called before the model's own forward is
                live.generating += 1
                counting, live.caller_gave_no_positions = (
                    live.caller_gave_no_positions,
                    kwargs.get("position_ids") is None,
                )
                try:
                    return frozen_generate(self, *args, **kwargs)
                finally:
                    live.generating -= 1
                    live.caller_gave_no_positions = counting
                    _finish(live, bound)

        members["generate"] = generate
    return same_named_subclass(base, members)


@cache
def block_class(base: type[nn.Module]) -> type[nn.Module]:
    """The swapped class of a block: a tap that also carries its route through activation checkpointing."""
    frozen_forward = base.forward

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        live: ActiveRoute | None = self._kitout_live
        if live and live.prefilling and getattr(self, "gradient_checkpointing", False):
            self.gradient_checkpointing = False  # a prompt is short, and its keys are wanted in this very graph
            try:
                return base.__call__(self, *args, **kwargs)
            finally:
                self.gradient_checkpointing = True
        if live and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            known = live.depth or torch._C._current_graph_task_id() == -1  # else the route of some later forward
            if known and live.installed.programs and getattr(self, "gradient_checkpointing", False):
                kwargs[ROUTE] = live.installed
        return base.__call__(self, *args, **kwargs)

    @wraps(frozen_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = kwargs.pop(ROUTE, None)
        live: ActiveRoute | None = self._kitout_live
        if live is None:
            return frozen_forward(self, *args, **kwargs)
        if bound is None and _is_recomputing(live):
            bound = live.graphs.route_of_recomputation()
        if bound is None or (live.depth and bound is live.installed):
            return run(self, args, kwargs)
        with live.restored(bound):
            return run(self, args, kwargs)

    def run(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self._kitout_tap.program
        if program is None:
            return frozen_forward(self, *args, **kwargs)
        return program(self, frozen_forward, args, kwargs)

    members = {"__call__": call, "forward": forward, "frozen_forward": frozen_forward, "_kitout_live": None}
    return same_named_subclass(base, {"swap": block_class, **members})


def _finish_output(active: ActiveRoute, compiled: CompiledRoute, output: Any) -> Any:
    """The output as the caller knows it, and on record for recomputations."""
    if compiled.forward_state.drop_image_tokens is not None:
        output = compiled.forward_state.drop_image_tokens(output)
    for (
        tower
    ) in compiled.forward_state.caller_columns:  # states of an encoder come back as wide as its decoder read them
        output = trim_output(output, compiled.forward_state, tower, ENCODER)
    if torch.is_grad_enabled():
        active.graphs.record(output, compiled)
    return output


def _check_cache(active: ActiveRoute, compiled: CompiledRoute, kwargs: dict[str, Any]) -> None:
    """RouteError where a cache was filled behind prompts or prefixes and nothing of the kind is worn now."""
    cache = kwargs.get("past_key_values")
    if (
        compiled.forward_slot is None
        and cache is not None
        and any(active.cache_prefix_lengths.get(cache, ()))
        and int(cache.get_seq_length())
    ):
        raise RouteError(
            f"this cache was filled behind {max(active.cache_prefix_lengths[cache])} positions of a prompt or "
            "prefix, and none is worn "
            "now: go on under the route it was filled under, or with a fresh cache"
        )


def _check_trainable(state: KitState, model: nn.Module) -> None:
    """Training while merged would train nothing: the adapter is no longer in the graph."""
    if state.merged_names and model.training and torch.is_grad_enabled():
        raise MergeStateError(
            f"{state.merged_text} merged into the base, so a training forward would reach no adapter: unmerge() "
            "first, or run under model.eval() or torch.no_grad()"
        )


def _finish(active: ActiveRoute, compiled: CompiledRoute) -> None:
    """A call is over: whatever runs outside of one has the rows the route names."""
    if compiled.row_plan is not None and not (active.depth or active.generating):
        compiled.row_plan.batch = compiled.row_plan.size


def _is_recomputing(active: ActiveRoute) -> bool:
    """True in a block that runs inside a backward pass without having come through the model boundary."""
    if torch.compiler.is_compiling() or active.depth:
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def _check_rows(
    compiled: CompiledRoute, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], multiples: bool
) -> None:
    """The route names as many rows as the call has (inside generate, beams make it a multiple)."""
    rows, batch = compiled.num_rows or 1, _batch_size(model, args, kwargs)
    if batch == rows or (multiples and batch % rows == 0):
        if compiled.row_plan is not None:
            compiled.row_plan.batch = batch
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
