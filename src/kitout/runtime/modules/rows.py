"""Rows: one batch whose rows wear different things.

A plan says which row wears which distinct entry; the program of a module gives each entry's rows their own term. Rows
whose Deltas have a batched form go through it together; the others are gathered, mapped and put back. It knows terms
and indices, and nothing of names, methods or where modules sit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.weights import Frozen
from kitout.delta import Delta
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import Forward, first_tensor, with_first
from kitout.runtime.modules.module_adapter import Source
from kitout.runtime.modules.programs import One, Term, join, split


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
        return scatter(parts, index), memos

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
        return scatter(parts, index)


def _of_rows(value: Any, rows: Tensor, n: int) -> Any:
    """The arguments of a call with only these of the n rows in every tensor that has them."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and value.shape[0] == n else value
    if isinstance(value, tuple):
        return tuple(_of_rows(v, rows, n) for v in value)
    return {k: _of_rows(v, rows, n) for k, v in value.items()} if isinstance(value, dict) else value


def scatter(parts: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
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
