"""Programs: what one hooked module does under one route, compiled once and run at every call.

A program wraps the frozen forward in a term (`terms.py`): it maps the input, runs the module, maps the output, or
swaps parameters while the module runs. It knows nothing of names, methods or where modules sit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kitout.base.own_forward import swapped_parameters
from kitout.base.weights import FrozenModule, parameter_at
from kitout.delta import Delta
from kitout.runtime.hooks.class_swap import ForwardFn, first_tensor, replace_first_tensor
from kitout.runtime.modules.module_adapter import InputRelay
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

    def __init__(self, relays: Sequence[InputRelay], inner: Any = None) -> None:
        self.relays, self.inner = tuple(relays), inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        for relay in self.relays:
            relay.value = x
        return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)


class DirectDelta:
    """The fast path: one Delta on the module's own x and y, nothing else."""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self.is_fusable = type(delta).fused_linear is not Delta.fused_linear

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else first_tensor(args, kwargs)
        if self.is_fusable and forward is nn.Linear.forward:
            own = module._parameters
            w = own.get("weight")
            # A sharded or quantized weight is of a class of its own; a parametrized one is no parameter.
            fused = None
            if type(w) is nn.Parameter and not w.requires_grad and "bias" in own:
                fused = self.delta.fused_linear(x, w, own["bias"])
            if fused is not None:
                return fused
        return self.delta.forward_(x, forward(module, *args, **kwargs))


class SwapParameters:
    """Runs a module with a term's own values for some of its parameters, for a whole batch.

    names: of those parameters. inner: what else the module runs.
    """

    def __init__(self, term: Term, names: Sequence[str], inner: Any = None) -> None:
        self.term, self.names, self.inner = term, tuple(names), inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with swapped_parameters(module, self.term.map_parameters(parameters_now(module, self.names))):
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


class WholeBatch:
    """One term for the whole batch. call_views: views that need the module's call."""

    def __init__(
        self,
        term: Term,
        replaces_module: bool,
        may_overwrite: bool,
        relays: Sequence[InputRelay],
        call_views: Sequence[FrozenModule] = (),
    ) -> None:
        self.term, self.replaces_module, self.may_overwrite = term, replaces_module, may_overwrite
        self.relays, self.call_views = tuple(relays), tuple(call_views)

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        new_x, memo = self.term.map_input(x)
        for view in self.call_views:
            view.call_args, view.call_kwargs = args, kwargs
        if self.replaces_module:
            out = self.term.map_output(memo, new_x, False)
            for view in self.call_views:
                view.clear_call()
            return out
        if new_x is not x:
            args, kwargs = replace_first_tensor(args, kwargs, new_x)
        y, wrapping = unpack_output(forward(module, *args, **kwargs))
        y = self.term.map_output(memo, y, self.may_overwrite)
        for relay in self.relays:
            relay.value = None
        for view in self.call_views:
            view.clear_call()
        return repack_output(y, wrapping)
