"""The model boundary: where a route meets a call, and the block boundary: where recomputation finds it again.

At the top of the model the context's route is resolved once, checked against the batch and installed on the hooks;
inside the graph only plain attributes are read. Blocks hand their route to activation checkpointing as one more
keyword argument, so a recomputation runs under the route of its forward. It knows nothing of adapters or methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from kitout.errors import MergeStateError, RouteError
from kitout.route import adapter_names
from kitout.runtime.hooks.class_swap import ForwardFn, same_named_subclass
from kitout.runtime.hooks.token_tables import CHANGES_TABLES, is_resize_to_own_size, tables_change
from kitout.runtime.hooks.unused_sites import UnusedSiteCheck
from kitout.runtime.modules.media_rows import media_refusal
from kitout.runtime.output_width import output_width_of
from kitout.runtime.routing.active import ActiveRoute, CompiledRoute
from kitout.runtime.routing.average import average_output, check_generation, encode_copies, repeat_call
from kitout.runtime.state import KitState
from kitout.runtime.virtual_tokens.positions import arguments_by_name
from kitout.runtime.virtual_tokens.widen_sequence import trim_output

ROUTE = "_kitout_route"  # the keyword a block's route travels under
ENCODER = ("encoder_last_hidden_state", "encoder_hidden_states")

# What runs in the place of a model's or block's own method: (module, the original method, args, kwargs) -> its output.
Boundary = Callable[[Any, ForwardFn, tuple[Any, ...], dict[str, Any]], Any]


def _bounded(original: ForwardFn, boundary: Boundary) -> ForwardFn:
    """A method that runs the boundary with the original; transformers reads the signature of a model's forward."""

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return boundary(self, original, args, kwargs)

    return method


@cache
def model_class(base: type[nn.Module]) -> type[nn.Module]:
    """The swapped class of the model itself."""
    members: dict[str, Any] = {
        "swap": model_class,
        "_kitout": None,
        "frozen_train": base.train,
        "forward": _bounded(base.forward, _model_forward),
        "train": _model_train,
        "__deepcopy__": _model_deepcopy,
    }
    if hasattr(base, "generate"):
        members["generate"] = _bounded(base.generate, _model_generate)
    for name in CHANGES_TABLES:
        if hasattr(base, name):
            members[name] = _bounded(getattr(base, name), _model_changes_tables)
    if hasattr(base, "init_continuous_batching"):
        members["init_continuous_batching"] = _bounded(base.init_continuous_batching, _model_init_batching)
    return same_named_subclass(base, members)


@cache
def block_class(base: type[nn.Module]) -> type[nn.Module]:
    """The swapped class of a block: hooked, and it carries its route through activation checkpointing."""
    members: dict[str, Any] = {
        "swap": block_class,
        "_kitout_active": None,
        "frozen_forward": base.forward,
        "__call__": _bounded(base.__call__, _block_call),
        "forward": _bounded(base.forward, _block_forward),
    }
    return same_named_subclass(base, members)


# ---- the model -------------------------------------------------------------------------------------------------------


def _model_forward(model: Any, frozen_forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling() or model._kitout is None:
        return frozen_forward(model, *args, **kwargs)  # the hooks already hold the route that `use` installed
    state: KitState = model._kitout.state
    active, calls = state.active, state.active.calls
    if calls.prefills:
        return frozen_forward(model, *args, **kwargs)
    active.make_sticky()
    with active.lock:
        state.check_attached()  # another thread may have detached it while this one waited
        if state.merged_names and model.training and torch.is_grad_enabled():
            raise MergeStateError(
                f"{state.merged_text} merged into the base, so a training forward would reach no adapter: unmerge() "
                "first, or run under model.eval() or torch.no_grad()"
            )
        compiled = state.compiled_route().for_new_forward(calls.positions_from_generate)
        if torch.is_grad_enabled() and not calls.forwards:
            _check_backward(active, compiled)
            if state.modules.training and compiled.programs is not state.training_watch.programs:
                adapters = [state[name] for name in state.names_with_parts(adapter_names(compiled.route))]
                state.training_watch.note(compiled.programs, adapters)
        if compiled.num_rows is not None and calls.forwards == 0:
            if compiled.average is not None:
                args, kwargs = repeat_call(compiled.average, args, kwargs, _batch_size(model, args, kwargs))
            may_multiply = calls.generates > 0 or compiled.average is not None
            _check_rows(compiled, model, args, kwargs, is_forward=True, may_multiply=may_multiply)
        active.install(compiled)
        calls.forwards += 1
        try:
            _check_cache(active, compiled, kwargs)
            width = compiled.output_width
            with (
                # Inside generate an encoder may run before the model's forward does: the whole of it is checked.
                UnusedSiteCheck(state) if state.unproven and not calls.generates else nullcontext(),
                nullcontext() if width is None else output_width_of(width, kwargs.get("labels")),
            ):
                output = frozen_forward(model, *args, **kwargs)
            if compiled.average is not None and calls.forwards == 1:
                output = average_output(compiled.average, output, getattr(model, "config", None))
        finally:
            calls.forwards -= 1
            _reset_rows(active, compiled)
        return _finish_output(active, compiled, output)


def run_backbone(model: Any, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The part of a model before its head, called as the whole model is: route, rows and recomputation included."""
    return _model_forward(model, lambda _, *args, **kwargs: backbone(*args, **kwargs), args, kwargs)


def _model_generate(model: Any, frozen_generate: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if model._kitout is None:
        return frozen_generate(model, *args, **kwargs)
    state: KitState = model._kitout.state
    active, calls = state.active, state.active.calls
    gave_no_positions = kwargs.get("position_ids") is None
    active.make_sticky()
    with active.lock:
        state.check_attached()
        compiled = state.compiled_route().for_new_forward(gave_no_positions)
        if compiled.average is not None:
            check_generation(model, args, kwargs)
            if compiled.row_plan is not None:
                compiled.row_plan.is_exact = False  # the encoder's are all copies of the rows
        elif compiled.num_rows is not None:
            _check_rows(compiled, model, args, kwargs, is_forward=False, may_multiply=False)
        active.install(compiled)  # an encoder may be called before the model's own forward is
        calls.generates += 1
        outer, calls.caller_gave_no_positions = calls.caller_gave_no_positions, gave_no_positions
        width = compiled.output_width
        try:
            with (
                UnusedSiteCheck(state) if state.unproven and calls.generates == 1 else nullcontext(),
                nullcontext() if width is None else output_width_of(width, None),
            ):
                if compiled.average is not None:
                    args, kwargs = encode_copies(compiled.average, model, args, kwargs)
                return frozen_generate(model, *args, **kwargs)
        finally:
            calls.generates -= 1
            calls.caller_gave_no_positions = outer
            _reset_rows(active, compiled)


def _model_changes_tables(model: Any, change: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if model._kitout is None:
        return change(model, *args, **kwargs)
    if is_resize_to_own_size(model, change.__name__, args, kwargs):
        return model.get_input_embeddings()
    with tables_change(model._kitout.state, change.__name__):
        return change(model, *args, **kwargs)


def _model_init_batching(model: Any, original: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Continuous batching, also by `generate_batch`, calls the model in a thread of its own."""
    if model._kitout is not None:
        active = model._kitout.state.active
        active.make_sticky()
        if active.route != active.sticky_route:
            raise RouteError(
                f"continuous batching runs in a thread of its own, where the `with` of {active.route!r} does not hold: "
                f"call kit.use({active.route!r}) without a `with`, or generate()"
            )
    return original(model, *args, **kwargs)


def _model_train(model: Any, mode: bool = True) -> Any:
    if model._kitout is None:
        return type(model).frozen_train(model, mode)
    model._kitout.train(mode)  # the adapters' dropout follows the model's mode; trains this module in turn
    return model


def _model_deepcopy(model: Any, memo: dict[int, Any]) -> Any:
    original = getattr(type(model).__dict__["kitout_base"], "__deepcopy__", None)
    if model._kitout is None:
        return deepcopy_module(model, memo) if original is None else original(model, memo)
    with model._kitout.state.active.lock:
        return deepcopy_module(model, memo) if original is None else original(model, memo)


def deepcopy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What copy.deepcopy makes of a module without a `__deepcopy__` of its own.

    For those that define one to hold a lock meanwhile: no other thread is then in the middle of a forward.
    """
    reduced: Any = module.__reduce_ex__(4)
    make, args, state = reduced[:3]
    copied: nn.Module = make(*args)
    memo[id(module)] = copied
    copied.__setstate__(copy.deepcopy(state, memo))
    return copied


def _check_rows(
    compiled: CompiledRoute,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_forward: bool,
    may_multiply: bool,
) -> None:
    """The route names as many rows as the call has (inside generate, beams make it a multiple)."""
    rows, batch = compiled.num_rows or 1, _batch_size(model, args, kwargs)
    if batch != rows and not (may_multiply and batch % rows == 0):
        raise RouteError(
            f"the route names {rows} rows but this call has a batch of {batch}: use([...]) takes one entry per row, "
            "in order, None for base rows"
        )
    if compiled.row_plan is not None:
        compiled.row_plan.batch, compiled.row_plan.is_exact = batch, is_forward
    if compiled.media_plan is not None:
        call = arguments_by_name(type(model).forward, args, kwargs)
        refusal, number = media_refusal(getattr(model, "config", None), call, batch)
        compiled.media_plan.refusal, compiled.media_plan.batch = refusal, number or batch


def _reset_rows(active: ActiveRoute, compiled: CompiledRoute) -> None:
    """A call is over: whatever runs outside of one has the rows the route names, inside generate a multiple."""
    if active.calls.forwards:
        return
    for plan in (compiled.row_plan, compiled.media_plan):
        if plan is not None:
            plan.is_exact = not active.calls.generates
            if not active.calls.generates:
                plan.batch, plan.refusal = plan.size, ""


def _batch_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of a call: dim 0 of its text, else of its main input, else of the first tensor in it."""
    text = kwargs.get("input_ids")  # in a model whose main input is images as well: rows are texts
    main = kwargs.get(getattr(model, "main_input_name", "input_ids"))
    for value in (text, main, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0]
    raise RouteError("the route names rows, but this call has no tensor to count them by")


def _check_cache(active: ActiveRoute, compiled: CompiledRoute, kwargs: dict[str, Any]) -> None:
    """RouteError where a cache was filled behind prompts or prefixes and the route has none."""
    cache = kwargs.get("past_key_values")
    if compiled.forward_slot is not None or cache is None:
        return
    lengths = active.cache_prefix_lengths.get(cache, ())
    if any(lengths) and int(cache.get_seq_length()):
        raise RouteError(
            f"this cache was filled behind {max(lengths)} virtual tokens, and the active route has none: continue "
            "under the route it was filled under, or start a new cache"
        )


def _check_backward(active: ActiveRoute, compiled: CompiledRoute) -> None:
    """RouteError where a backward pass runs the whole model again, after the route of its forward has ended."""
    reached = active.graphs.reached()
    if reached is not None and reached.route != compiled.route:
        raise RouteError(
            f"this model is called inside a backward pass under {compiled.route!r}, and the forward that the pass came "
            f"through ran under {reached.route!r}: if activation checkpointing runs the whole model again, call "
            "backward() where that route is active; a call that is not part of it belongs after backward() or in "
            "torch.no_grad()"
        )


def _finish_output(active: ActiveRoute, compiled: CompiledRoute, output: Any) -> Any:
    """The output as the caller knows it, and on record for recomputations."""
    state = compiled.forward_state
    if state.drop_image_tokens is not None:
        output = state.drop_image_tokens(output)
    for tower in state.caller_columns:  # states of an encoder come back as wide as its decoder read them
        output = trim_output(output, state, tower, ENCODER)
    if torch.is_grad_enabled():
        active.graphs.record(output, compiled)
    return output


# ---- a block ---------------------------------------------------------------------------------------------------------


def _block_call(block: Any, call: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    active: ActiveRoute | None = block._kitout_active
    checkpointed = active is not None and getattr(block, "gradient_checkpointing", False)
    if active is not None and checkpointed and active.installed.forward_state.is_prefill:
        block.gradient_checkpointing = False  # a prompt is short, and its keys are wanted in this very graph
        try:
            return call(block, *args, **kwargs)
        finally:
            block.gradient_checkpointing = True
    if active and checkpointed and block.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Inside a backward, what is installed may be the route of some later forward.
        is_known = active.calls.forwards or torch._C._current_graph_task_id() == -1
        if is_known and active.installed.programs:
            kwargs[ROUTE] = active.installed
    return call(block, *args, **kwargs)


def _block_forward(block: Any, frozen_forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    compiled: CompiledRoute | None = kwargs.pop(ROUTE, None)
    active: ActiveRoute | None = block._kitout_active
    if active is None:
        return frozen_forward(block, *args, **kwargs)
    if compiled is None and _is_recomputing(active):
        compiled = active.graphs.route_of_recomputation()
    if compiled is None or (active.calls.forwards and compiled is active.installed):
        return _run_program(block, frozen_forward, args, kwargs)
    with active.restored(compiled):
        return _run_program(block, frozen_forward, args, kwargs)


def _run_program(block: Any, frozen_forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hook = block._kitout_hook
    program = hook.program if hook.graphs is None or torch.compiler.is_compiling() else hook.graphs
    if program is None:
        return frozen_forward(block, *args, **kwargs)
    return program(block, frozen_forward, args, kwargs)


def _is_recomputing(active: ActiveRoute) -> bool:
    """True in a block that runs inside a backward pass without having come through the model boundary."""
    if torch.compiler.is_compiling() or active.calls.forwards:
        return False
    return bool(torch._C._current_graph_task_id() != -1)
