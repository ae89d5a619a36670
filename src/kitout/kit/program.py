"""Programs: what one tapped module does under one route, compiled once and run at every call.

A term is an adapter (`Local`), a chain of terms or a blend of them, with the two moments a module has: `enter` maps
its input, `leave` its output. Programs wrap a term around the frozen forward; `Rows` gives each row its own term.
It knows nothing of names, methods or where modules sit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kitout.base.weights import Frozen, exchanged
from kitout.errors import RouteError
from kitout.kit.delta import Delta
from kitout.kit.local import Local, Source, same_shape
from kitout.kit.tap import Forward, first_tensor, with_first


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


class Plan:
    """Which rows wear which entry, and the index tensors for every multiple of the batch a site may see."""

    def __init__(self, entries: Sequence[int], distinct: int) -> None:
        self.entries, self.size, self.distinct = tuple(entries), len(entries), distinct
        self.batch = self.size  # rows of the call in progress: beams make it a multiple
        self._index: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}

    def index(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """Row numbers of each distinct entry where dim 0 has `rows` values, a multiple of the batch, row-major."""
        key = rows, device
        if key not in self._index:
            each = self.expanded(rows)
            # Kept for later calls, which may record a graph: not to be made as inference tensors.
            where = [[r for r, e in enumerate(each) if e == i] for i in range(self.distinct)]
            with torch.inference_mode(False):
                self._index[key] = tuple(torch.tensor(w, device=device) for w in where)
        return self._index[key]

    def expanded(self, rows: int) -> tuple[int, ...]:
        k = rows // self.size
        return tuple(e for e in self.entries for _ in range(k))


class Rows:
    """One term per distinct entry of a batch; None where an entry wears nothing here.

    Rows whose Delta has a batched form go through it together; the others are gathered, mapped and put back.
    """

    def __init__(
        self,
        plan: Plan,
        terms: Sequence[Term | None],
        path: str,
        rows: str,
        sources: Sequence[Source],
        calls: Sequence[Frozen] = (),
    ) -> None:
        self.plan, self.terms, self.path, self.rows, self.sources = plan, tuple(terms), path, rows, tuple(sources)
        self.calls = tuple(calls)
        self.enters = any(t is not None and t.enters for t in terms)
        self.batch = _batch_of(self.terms)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        if self.rows == "one":
            x = self._for_each_row(x)
            args, kwargs = with_first(args, kwargs, x)
        self._check(x.shape[0])
        if not self.enters and self.batch is not None:
            y, whole = split(forward(module, *args, **kwargs))
            fast = self.batch(x, y, self.plan)
            if fast is not None:
                return join(fast, whole)
            return join(self._leave(x, None, y, args, kwargs), whole)
        memos = None
        if self.enters:
            entered, memos = self._enter(x)
            args, kwargs = with_first(args, kwargs, entered)
        y, whole = split(forward(module, *args, **kwargs))
        if self.rows == "one":
            y = self._for_each_row(y)
        return join(self._leave(x, memos, y, args, kwargs), whole)

    def _for_each_row(self, value: Tensor) -> Tensor:
        """What a position table is asked, or answers, once for all rows."""
        return value.expand(self.plan.batch, *value.shape[1:]) if value.shape[0] == 1 else value

    def _check(self, rows: int) -> None:
        strays = self.rows == "batch" and rows != self.plan.batch
        if self.rows == "none" or rows % self.plan.size or strays:
            raise RouteError(
                f"{self.path} sees {rows} rows while the route names {self.plan.size}: its first dimension does not "
                "follow the batch, so rows cannot wear different adapters here; use one adapter for the whole batch"
            )

    def _enter(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        parts, memos = [], []
        index = self.plan.index(x.shape[0], x.device)
        for term, rows in zip(self.terms, index, strict=True):
            part, memo = (x[rows], None) if term is None else term.enter(x[rows])
            parts.append(part)
            memos.append(memo)
        return _scatter(parts, index), memos

    def _leave(
        self, x: Tensor, memos: list[Any] | None, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        parts = []
        index = self.plan.index(y.shape[0], y.device)
        held = [s.value for s in self.sources]
        for i, (term, rows) in enumerate(zip(self.terms, index, strict=True)):
            part = y[rows]
            if term is not None:
                for source, value in zip(self.sources, held, strict=True):
                    source.value = None if value is None else value[rows]
                for call in self.calls:
                    call.args, call.kwargs = _of_rows((args, kwargs), rows, x.shape[0])
                memo = term.enter(x[rows])[1] if memos is None else memos[i]
                part = term.leave(memo, part, True)
                for call in self.calls:
                    call.forget()
                if not isinstance(part, Tensor):
                    raise RouteError(f"{self.path} gives several values, which a row cannot have of its own")
                if part.shape[0] != len(rows):  # answered once for all of them
                    part = part.expand(len(rows), *part.shape[1:])
            parts.append(part)
        for source in self.sources:
            source.value = None
        widths = {p.shape[1:] for p in parts}
        if len(widths) > 1:
            raise RouteError(
                f"{self.path}: rows of one batch come out with different shapes {sorted(map(tuple, widths))} "
                "(heads of different width?): run them in separate batches"
            )
        return _scatter(parts, index)


def _of_rows(value: Any, rows: Tensor, n: int) -> Any:
    """The arguments of a call with only these of the n rows in every tensor that has them."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and value.shape[0] == n else value
    if isinstance(value, tuple):
        return tuple(_of_rows(v, rows, n) for v in value)
    return {k: _of_rows(v, rows, n) for k, v in value.items()} if isinstance(value, dict) else value


def _scatter(parts: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
    """Rows put back in order: parts[i] belongs at index[i]."""
    order = torch.cat(tuple(index))
    return torch.cat(tuple(parts)).index_select(0, order.argsort())


class _Batch:
    """The batched fast path of a row plan: every term that is there is one plain Delta of one class."""

    def __init__(self, cls: type[Delta], deltas: Sequence[Delta], slots: Sequence[int]) -> None:
        self.cls, self.deltas, self.slots = cls, tuple(deltas), tuple(slots)
        self._rows: dict[int, tuple[int, ...]] = {}
        self._scratch: dict[int, dict[str, Any]] = {}

    def __call__(self, x: Tensor, y: Tensor, plan: Plan) -> Tensor | None:
        n = x.shape[0]
        if n not in self._rows:
            self._rows[n] = tuple(self.slots[e] for e in plan.expanded(n))
            self._scratch[n] = {}
        return self.cls.batched(self.deltas, self._rows[n], x, y, self._scratch[n])


def _batch_of(terms: Sequence[Term | None]) -> _Batch | None:
    deltas: list[Delta] = []
    slots: list[int] = []
    for term in terms:
        if term is None:
            slots.append(-1)
            continue
        if not isinstance(term, One) or term.local.strength != 1.0 or len(term.local.outs) != 1 or term.enters:
            return None
        part = term.local.outs[0]
        if not part.simple or type(part.delta).batched.__func__ is Delta.batched.__func__:  # type: ignore[attr-defined]
            return None
        slots.append(len(deltas))
        deltas.append(part.delta)
    if not deltas or len({type(d) for d in deltas}) > 1:
        return None
    return _Batch(type(deltas[0]), deltas, slots)
