"""Programs: what one tapped module does under one route, compiled once and run at every call.

A term is an adapter (`Local`), a chain of terms or a blend of them, with the two moments a module has: `enter` maps
its input, `leave` its output. Programs wrap a term around the frozen forward.
It knows nothing of names, methods or where modules sit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from kitout.base.weights import FrozenModule, swapped_parameters
from kitout.delta import Delta
from kitout.runtime.hooks.class_swap import ForwardFn, first_tensor, replace_first_tensor
from kitout.runtime.modules.module_adapter import InputRelay, ModuleAdapter, check_blendable


class Term(Protocol):
    """A map of one module: `enter(x) -> (input for the module, memo)`, then `leave(memo, y) -> y`.

    swap: the module's parameters, by name, as they are while it runs.
    """

    @property
    def maps_input(self) -> bool: ...
    def map_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def map_input(self, x: Tensor) -> tuple[Tensor, Any]: ...
    def map_output(self, memo: Any, y: Tensor, may_overwrite: bool) -> Tensor: ...


class Single:
    """A single adapter."""

    def __init__(self, module_adapter: ModuleAdapter) -> None:
        self.module_adapter, self.maps_input = module_adapter, bool(module_adapter.on_input)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.module_adapter.map_parameters(parameters)

    def map_input(self, x: Tensor) -> tuple[Tensor, Any]:
        new = self.module_adapter.map_input(x)
        return new, new

    def map_output(self, memo: Any, y: Tensor, may_overwrite: bool) -> Tensor:
        return self.module_adapter.map_output(memo, y, may_overwrite)


class TermSequence:
    """Adapters in order: each takes the module as the ones before it have left it (f_i = out_i . f_{i-1} . in_i)."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms, self.maps_input = tuple(terms), any(t.maps_input for t in terms)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for term in self.terms:
            parameters = term.map_parameters(parameters)
        return dict(parameters)

    def map_input(self, x: Tensor) -> tuple[Tensor, Any]:
        memos: list[Any] = []
        for term in reversed(self.terms):
            x, memo = term.map_input(x)
            memos.append(memo)
        return x, memos[::-1]

    def map_output(self, memo: Any, y: Tensor, may_overwrite: bool) -> Tensor:
        for term, m in zip(self.terms, memo, strict=True):
            new = term.map_output(m, y, may_overwrite)
            may_overwrite = may_overwrite or new is not y
            y = new
        return y


class WeightedSum:
    """y + sum_i w_i (term_i(y) - y), at the input and at the output."""

    def __init__(self, terms: Sequence[tuple[Term, float]]) -> None:
        self.terms, self.maps_input = tuple(terms), any(t.maps_input for t, _ in terms)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        swapped = [(term.map_parameters(parameters), w) for term, w in self.terms]
        return {n: value + sum(w * (new[n] - value) for new, w in swapped) for n, value in parameters.items()}

    def map_input(self, x: Tensor) -> tuple[Tensor, Any]:
        entered = [(term.map_input(x), w) for term, w in self.terms]
        new = x
        for (ex, _), w in entered:
            new = new if ex is x else new + w * (ex - x)
        return new, [m for (_, m), _ in entered]

    def map_output(self, memo: Any, y: Tensor, may_overwrite: bool) -> Tensor:
        new = y
        for (term, w), m in zip(self.terms, memo, strict=True):
            left = term.map_output(m, y, False)
            new = new if left is y else new + w * (check_blendable(left, y) - y)
        return new


def unpack_output(out: Any) -> tuple[Tensor, Any]:
    """A module's output as (tensor, how to put it back): blocks may return a tuple whose first item is the value."""
    if isinstance(out, Tensor):
        return out, None
    return out[0], out


def repack_output(y: Tensor, whole: Any) -> Any:
    return y if whole is None else (y, *whole[1:])


class RelayInput:
    """The program of a module whose input is a source for sites elsewhere; it may wear something itself."""

    def __init__(self, relays: Sequence[InputRelay], inner: Any = None) -> None:
        self.relays, self.inner = tuple(relays), inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        for source in self.relays:
            source.value = x
        return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)


class DirectDelta:
    """The fast path: one Delta on the module's own x and y, nothing else."""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self.is_fusable = type(delta).fused_linear is not Delta.fused_linear

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else first_tensor(args, kwargs)
        if self.is_fusable and forward is nn.Linear.forward:
            w, b = module._parameters["weight"], module._parameters["bias"]
            # A sharded or quantised weight is of a class of its own.
            fused = self.delta.fused_linear(x, w, b) if type(w) is nn.Parameter and not w.requires_grad else None
            if fused is not None:
                return fused
        return self.delta.forward_(x, forward(module, *args, **kwargs))


class SwapParameters:
    """Runs a module with a term's own values for some of its parameters: for a whole batch only.

    names: of those parameters. then: what the module wears besides.
    """

    def __init__(self, term: Term, names: Sequence[str], inner: Any = None) -> None:
        self.term, self.names, self.inner = term, tuple(names), inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = {name: module.get_parameter(name) for name in self.names}
        with swapped_parameters(module, self.term.map_parameters(now)):
            return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)


class WholeBatch:
    """One term for the whole batch. calls: views that want to know the module's call."""

    def __init__(
        self,
        term: Term,
        replaces_module: bool,
        may_overwrite: bool,
        relays: Sequence[InputRelay],
        call_views: Sequence[FrozenModule] = (),
    ) -> None:
        self.term, self.replaces_module, self.may_overwrite, self.relays = (
            term,
            replaces_module,
            may_overwrite,
            tuple(relays),
        )
        self.call_views = tuple(call_views)

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        entered, memo = self.term.map_input(x)
        for call in self.call_views:
            call.call_args, call.call_kwargs = args, kwargs
        if self.replaces_module:
            out = self.term.map_output(memo, entered, False)
            for call in self.call_views:
                call.clear_call()
            return out
        if entered is not x:
            args, kwargs = replace_first_tensor(args, kwargs, entered)
        y, whole = unpack_output(forward(module, *args, **kwargs))
        y = self.term.map_output(memo, y, self.may_overwrite)
        for source in self.relays:
            source.value = None
        for call in self.call_views:
            call.clear_call()
        return repack_output(y, whole)
