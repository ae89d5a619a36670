"""Programs: what one hooked module does under one route, compiled once and run at every call.

A program wraps the frozen forward in a term (`terms.py`): it maps the input, runs the module, maps the output, or
swaps parameters while the module runs. It knows nothing of names, methods or where modules sit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kitout import fast
from kitout.base.own_forward import swapped_parameters
from kitout.base.weights import FrozenModule, parameter_at
from kitout.delta import Delta
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, first_tensor, original_class, replace_first_tensor
from kitout.runtime.modules.module_adapter import Relay
from kitout.runtime.modules.shared_input import FusedLinears, SharedInput, frozen_linear
from kitout.runtime.modules.terms import Term


def unpack_output(out: Any) -> tuple[Tensor, Any]:
    """A module's output as (tensor, how to put it back): blocks may return a tuple whose first item is the value."""
    if isinstance(out, Tensor):
        return out, None
    return out[0], out


def repack_output(y: Tensor, wrapping: Any) -> Any:
    return y if wrapping is None else (y, *wrapping[1:])


class RelayInput:
    """The program of a module whose input other sites read. inner: its own program."""

    def __init__(self, relays: Sequence[Relay], inner: Any = None) -> None:
        self.relays, self.inner = tuple(relays), inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        for relay in self.relays:
            relay.value = x
        return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)


class DirectDelta:
    """The fast path: one Delta on the module's own x and y, nothing else.

    shared_input: the linears that are called with the same tensor as this one, which is this number of them.
    """

    def __init__(self, delta: Delta, frozen: FrozenModule | None) -> None:
        self.delta, self.frozen = delta, frozen
        self.is_fusable = type(delta).fused_linear is not Delta.fused_linear
        self.shared_input: SharedInput | None = None
        self.number = 0

    @property
    def fusing_key(self) -> object:
        """Programs of the same key may compute together, if they read one tensor; those of None may not."""
        return type(self.delta) if self.is_fusable else None

    @staticmethod
    def fuse_with(programs: Sequence[Any]) -> FusedLinears:
        """Several of the same key as one computation."""
        deltas = [program.delta for program in programs]
        return partial(type(deltas[0]).fused_linears, deltas)

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else first_tensor(args, kwargs)
        if not fast.enabled():
            y = forward(module, *args, **kwargs)
            return self.delta(x, y) if self.frozen is None else self.delta(x, y, self.frozen)
        if self.is_fusable and forward is nn.Linear.forward:
            fused = None if self.shared_input is None else self.shared_input.output(self.number, x)
            if fused is None and (linear := frozen_linear(module, x)) is not None:
                fused = self.delta.fused_linear(x, *linear)
            if fused is not None:
                return fused
        return self.delta.forward_(x, forward(module, *args, **kwargs), self.frozen)


class SwapParameters:
    """Runs a module with a term's own values for some of its parameters, for a whole batch.

    names: of its own parameters, where they are the same in all runs. weight_names: of what it multiplies by. inner:
    what else the module runs.
    """

    def __init__(self, term: Term, names: Sequence[str], weight_names: Sequence[str], inner: Any = None) -> None:
        self.term, self.names, self.weight_names, self.inner = term, tuple(names), tuple(weight_names), inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values: dict[str, Tensor] = {}
        if self.names:
            values |= self.term.map_parameters(parameters_now(module, self.names))[0]
        if self.weight_names:
            values |= self.term.map_weights(parameters_now(module, self.weight_names))
        with swapped_parameters(module, values):
            return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)


def parameters_now(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The module's parameters; zeros for a bias that it does not have, which only its weight in the same place has."""
    values = {name: parameter_at(module, name) for name in names}
    weight = next(value for value in values.values() if value is not None)
    absent = {n: weight.new_zeros(_matching_weight(module, n).shape[0]) for n, value in values.items() if value is None}
    return {n: absent[n] if value is None else value for n, value in values.items()}


def _matching_weight(module: nn.Module, bias_name: str) -> Tensor:
    """The weight beside a bias: "in_proj_bias" -> in_proj_weight, "out_proj.bias" -> out_proj.weight."""
    weight = parameter_at(module, bias_name.removesuffix("bias") + "weight")
    assert weight is not None
    return weight


def check_no_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], consequence: str) -> None:
    """RouteError where a module that is to run several times is given something that may keep what it computes."""
    for value in (*args, *kwargs.values()):
        if not isinstance(value, (Tensor, tuple, list, dict, str, int, float, torch.dtype, type(None))):
            raise RouteError(
                f"{original_class(module).__name__} is given a {type(value).__name__}, which may keep what it "
                f"computes: {consequence}, or use_cache=False"
            )


class WholeBatch:
    """One term for the whole batch. call_views: views that need the module's call.

    names: of the module's own parameters, where they differ between its runs.
    """

    def __init__(
        self,
        term: Term,
        replaces_module: bool,
        may_overwrite: bool,
        relays: Sequence[Relay],
        call_views: Sequence[FrozenModule] = (),
        names: Sequence[str] = (),
    ) -> None:
        self.term, self.replaces_module, self.may_overwrite = term, replaces_module, may_overwrite
        self.relays, self.call_views, self.names = tuple(relays), tuple(call_views), tuple(names)

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        inputs, memo = self.term.map_input(x)
        for view in self.call_views:
            view.call_args, view.call_kwargs = args, kwargs
        if self.replaces_module:
            out = self.term.map_output(memo, inputs, False)
            for view in self.call_views:
                view.clear_call()
            return out
        if len(inputs) == 1:
            if inputs[0] is not x:
                args, kwargs = replace_first_tensor(args, kwargs, inputs[0])
            y, wrapping = unpack_output(forward(module, *args, **kwargs))
            ys = [y]
        else:
            ys, wrapping = self._run_for_each(module, forward, args, kwargs, inputs)
        y = self.term.map_output(memo, ys, self.may_overwrite)
        for relay in self.relays:
            relay.value = None
        for view in self.call_views:
            view.clear_call()
        return repack_output(y, wrapping)

    def _run_for_each(
        self,
        module: nn.Module,
        forward: ForwardFn,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: Sequence[Tensor],
    ) -> tuple[list[Tensor], Any]:
        """The module's output for each input; whatever else it gives is that of the first run."""
        check_no_state(module, args, kwargs, "a Mix here runs it more than once; use its adapters in a Stack")
        values: list[dict[str, Tensor]] = [{}] * len(inputs)
        if self.names:
            values = self.term.map_parameters(parameters_now(module, self.names))
        outputs = []
        for new_x, of_run in zip(inputs, values, strict=True):
            new_args, new_kwargs = replace_first_tensor(args, kwargs, new_x)
            with swapped_parameters(module, of_run):
                outputs.append(unpack_output(forward(module, *new_args, **new_kwargs)))
        return [y for y, _ in outputs], outputs[0][1]
