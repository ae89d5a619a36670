"""Programs: what one tapped module does under one route, compiled once and run at every call.

A term is an adapter (`Local`), a chain of terms or a blend of them, with the two moments a module has: `enter` maps
its input, `leave` its output. Programs wrap a term around the frozen forward.
It knows nothing of names, methods or where modules sit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from kitout.base.weights import Frozen, exchanged
from kitout.delta import Delta
from kitout.runtime.hooks.class_swap import Forward, first_tensor, with_first
from kitout.runtime.modules.module_adapter import Local, Source, same_shape


class Term(Protocol):
    """A map of one module: `enter(x) -> (input for the module, memo)`, then `leave(memo, y) -> y`.

    swap: the module's parameters, by name, as they are while it runs.
    """

    @property
    def enters(self) -> bool: ...
    def swap(self, now: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def enter(self, x: Tensor) -> tuple[Tensor, Any]: ...
    def leave(self, memo: Any, y: Tensor, own: bool) -> Tensor: ...


class One:
    """A single adapter."""

    def __init__(self, local: Local) -> None:
        self.local, self.enters = local, bool(local.ins)

    def swap(self, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.local.swap(now)

    def enter(self, x: Tensor) -> tuple[Tensor, Any]:
        new = self.local.enter(x)
        return new, new

    def leave(self, memo: Any, y: Tensor, own: bool) -> Tensor:
        return self.local.leave(memo, y, own)


class Chain:
    """Adapters in order: each takes the module as the ones before it have left it (f_i = out_i . f_{i-1} . in_i)."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms, self.enters = tuple(terms), any(t.enters for t in terms)

    def swap(self, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for term in self.terms:
            now = term.swap(now)
        return dict(now)

    def enter(self, x: Tensor) -> tuple[Tensor, Any]:
        memos: list[Any] = []
        for term in reversed(self.terms):
            x, memo = term.enter(x)
            memos.append(memo)
        return x, memos[::-1]

    def leave(self, memo: Any, y: Tensor, own: bool) -> Tensor:
        for term, m in zip(self.terms, memo, strict=True):
            new = term.leave(m, y, own)
            own = own or new is not y
            y = new
        return y


class Blend:
    """y + sum_i w_i (term_i(y) - y), at the input and at the output."""

    def __init__(self, terms: Sequence[tuple[Term, float]]) -> None:
        self.terms, self.enters = tuple(terms), any(t.enters for t, _ in terms)

    def swap(self, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        swapped = [(term.swap(now), w) for term, w in self.terms]
        return {n: value + sum(w * (new[n] - value) for new, w in swapped) for n, value in now.items()}

    def enter(self, x: Tensor) -> tuple[Tensor, Any]:
        entered = [(term.enter(x), w) for term, w in self.terms]
        new = x
        for (ex, _), w in entered:
            new = new if ex is x else new + w * (ex - x)
        return new, [m for (_, m), _ in entered]

    def leave(self, memo: Any, y: Tensor, own: bool) -> Tensor:
        new = y
        for (term, w), m in zip(self.terms, memo, strict=True):
            left = term.leave(m, y, False)
            new = new if left is y else new + w * (same_shape(left, y) - y)
        return new


def split(out: Any) -> tuple[Tensor, Any]:
    """A module's output as (tensor, how to put it back): blocks may return a tuple whose first item is the value."""
    if isinstance(out, Tensor):
        return out, None
    return out[0], out


def join(y: Tensor, whole: Any) -> Any:
    return y if whole is None else (y, *whole[1:])


class Note:
    """The program of a module whose input is a source for sites elsewhere; it may wear something itself."""

    def __init__(self, sources: Sequence[Source], then: Any = None) -> None:
        self.sources, self.then = tuple(sources), then

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        for source in self.sources:
            source.value = x
        return forward(module, *args, **kwargs) if self.then is None else self.then(module, forward, args, kwargs)


class Direct:
    """The fast path: one Delta on the module's own x and y, nothing else."""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self.fuses = type(delta).through is not Delta.through

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else first_tensor(args, kwargs)
        if self.fuses and forward is nn.Linear.forward:
            w, b = module._parameters["weight"], module._parameters["bias"]
            # A sharded or quantised weight is of a class of its own.
            fused = self.delta.through(x, w, b) if type(w) is nn.Parameter and not w.requires_grad else None
            if fused is not None:
                return fused
        return self.delta.update(x, forward(module, *args, **kwargs))


class Exchange:
    """Runs a module with a term's own values for some of its parameters: for a whole batch only.

    names: of those parameters. then: what the module wears besides.
    """

    def __init__(self, term: Term, names: Sequence[str], then: Any = None) -> None:
        self.term, self.names, self.then = term, tuple(names), then

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = {name: module.get_parameter(name) for name in self.names}
        with exchanged(module, self.term.swap(now)):
            return forward(module, *args, **kwargs) if self.then is None else self.then(module, forward, args, kwargs)


class Whole:
    """One term for the whole batch. calls: views that want to know the module's call."""

    def __init__(
        self, term: Term, replaces: bool, fresh: bool, sources: Sequence[Source], calls: Sequence[Frozen] = ()
    ) -> None:
        self.term, self.replaces, self.fresh, self.sources = term, replaces, fresh, tuple(sources)
        self.calls = tuple(calls)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        entered, memo = self.term.enter(x)
        for call in self.calls:
            call.args, call.kwargs = args, kwargs
        if self.replaces:
            out = self.term.leave(memo, entered, False)
            for call in self.calls:
                call.forget()
            return out
        if entered is not x:
            args, kwargs = with_first(args, kwargs, entered)
        y, whole = split(forward(module, *args, **kwargs))
        y = self.term.leave(memo, y, self.fresh)
        for source in self.sources:
            source.value = None
        for call in self.calls:
            call.forget()
        return join(y, whole)
