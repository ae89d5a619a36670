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

from kitout.base.weights import FrozenModule
from kitout.delta import Delta
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, first_tensor, replace_first_tensor
from kitout.runtime.modules.module_adapter import InputRelay
from kitout.runtime.modules.programs import Single, Term, repack_output, unpack_output


class RowPlan:
    """Which rows wear which entry, and the index tensors for every multiple of the batch a site may see."""

    def __init__(self, entries: Sequence[int], num_distinct: int) -> None:
        self.entries, self.size, self.num_distinct = tuple(entries), len(entries), num_distinct
        self.batch = self.size  # rows of the call in progress: beams make it a multiple
        self._index: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}

    def index(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """Row numbers of each distinct entry where dim 0 has `rows` values, a multiple of the batch, row-major."""
        key = rows, device
        if key not in self._index:
            each = self.repeat_to(rows)
            # Kept for later calls, which may record a graph: not to be made as inference tensors.
            where = [[r for r, e in enumerate(each) if e == i] for i in range(self.num_distinct)]
            with torch.inference_mode(False):
                self._index[key] = tuple(torch.tensor(w, device=device) for w in where)
        return self._index[key]

    def repeat_to(self, rows: int) -> tuple[int, ...]:
        k = rows // self.size
        return tuple(e for e in self.entries for _ in range(k))


class PerRow:
    """One term per distinct entry of a batch; None where an entry wears nothing here.

    Rows whose Delta has a batched form go through it together; the others are gathered, mapped and put back.
    """

    def __init__(
        self,
        row_plan: RowPlan,
        terms: Sequence[Term | None],
        path: str,
        batch_relation: str,
        relays: Sequence[InputRelay],
        call_views: Sequence[FrozenModule] = (),
    ) -> None:
        self.row_plan, self.terms, self.path, self.batch_relation, self.relays = (
            row_plan,
            tuple(terms),
            path,
            batch_relation,
            tuple(relays),
        )
        self.call_views = tuple(call_views)
        self.maps_input = any(t is not None and t.maps_input for t in terms)
        self.batched_delta = _batched_delta_of(self.terms)

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        if self.batch_relation == "one":
            x = self._for_each_row(x)
            args, kwargs = replace_first_tensor(args, kwargs, x)
        self._check(x.shape[0])
        if not self.maps_input and self.batched_delta is not None:
            y, whole = unpack_output(forward(module, *args, **kwargs))
            fast = self.batched_delta(x, y, self.row_plan)
            if fast is not None:
                return repack_output(fast, whole)
            return repack_output(self._map_output(x, None, y, args, kwargs), whole)
        memos = None
        if self.maps_input:
            entered, memos = self._map_input(x)
            args, kwargs = replace_first_tensor(args, kwargs, entered)
        y, whole = unpack_output(forward(module, *args, **kwargs))
        if self.batch_relation == "one":
            y = self._for_each_row(y)
        return repack_output(self._map_output(x, memos, y, args, kwargs), whole)

    def _for_each_row(self, value: Tensor) -> Tensor:
        """What a position table is asked, or answers, once for all rows."""
        return value.expand(self.row_plan.batch, *value.shape[1:]) if value.shape[0] == 1 else value

    def _check(self, rows: int) -> None:
        strays = self.batch_relation == "batch" and rows != self.row_plan.batch
        if self.batch_relation == "none" or rows % self.row_plan.size or strays:
            raise RouteError(
                f"{self.path} sees {rows} rows while the route names {self.row_plan.size}: its first dimension "
                "does not "
                "follow the batch, so rows cannot wear different adapters here; use one adapter for the whole batch"
            )

    def _map_input(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        parts, memos = [], []
        index = self.row_plan.index(x.shape[0], x.device)
        for term, rows in zip(self.terms, index, strict=True):
            part, memo = (x[rows], None) if term is None else term.map_input(x[rows])
            parts.append(part)
            memos.append(memo)
        return scatter(parts, index), memos

    def _map_output(
        self, x: Tensor, memos: list[Any] | None, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        parts = []
        index = self.row_plan.index(y.shape[0], y.device)
        held = [s.value for s in self.relays]
        for i, (term, rows) in enumerate(zip(self.terms, index, strict=True)):
            part = y[rows]
            if term is not None:
                for source, value in zip(self.relays, held, strict=True):
                    source.value = None if value is None else value[rows]
                for call in self.call_views:
                    call.call_args, call.call_kwargs = _select_rows((args, kwargs), rows, x.shape[0])
                memo = term.map_input(x[rows])[1] if memos is None else memos[i]
                part = term.map_output(memo, part, True)
                for call in self.call_views:
                    call.clear_call()
                if not isinstance(part, Tensor):
                    raise RouteError(f"{self.path} gives several values, which a row cannot have of its own")
                if part.shape[0] != len(rows):  # answered once for all of them
                    part = part.expand(len(rows), *part.shape[1:])
            parts.append(part)
        for source in self.relays:
            source.value = None
        widths = {p.shape[1:] for p in parts}
        if len(widths) > 1:
            raise RouteError(
                f"{self.path}: rows of one batch come out with different shapes {sorted(map(tuple, widths))} "
                "(heads of different width?): run them in separate batches"
            )
        return scatter(parts, index)


def _select_rows(value: Any, rows: Tensor, n: int) -> Any:
    """The arguments of a call with only these of the n rows in every tensor that has them."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and value.shape[0] == n else value
    if isinstance(value, tuple):
        return tuple(_select_rows(v, rows, n) for v in value)
    return {k: _select_rows(v, rows, n) for k, v in value.items()} if isinstance(value, dict) else value


def scatter(parts: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
    """Rows put back in order: parts[i] belongs at index[i]."""
    order = torch.cat(tuple(index))
    return torch.cat(tuple(parts)).index_select(0, order.argsort())


class _BatchedDelta:
    """The batched fast path of a row plan: every term that is there is one plain Delta of one class."""

    def __init__(self, cls: type[Delta], deltas: Sequence[Delta], slots: Sequence[int]) -> None:
        self.cls, self.deltas, self.slots = cls, tuple(deltas), tuple(slots)
        self._rows: dict[int, tuple[int, ...]] = {}
        self._cache: dict[int, dict[str, Any]] = {}

    def __call__(self, x: Tensor, y: Tensor, row_plan: RowPlan) -> Tensor | None:
        n = x.shape[0]
        if n not in self._rows:
            self._rows[n] = tuple(self.slots[e] for e in row_plan.repeat_to(n))
            self._cache[n] = {}
        return self.cls.forward_rows(self.deltas, self._rows[n], x, y, self._cache[n])


def _batched_delta_of(terms: Sequence[Term | None]) -> _BatchedDelta | None:
    deltas: list[Delta] = []
    slots: list[int] = []
    for term in terms:
        if term is None:
            slots.append(-1)
            continue
        if (
            not isinstance(term, Single)
            or term.module_adapter.strength != 1.0
            or len(term.module_adapter.on_output) != 1
            or term.maps_input
        ):
            return None
        part = term.module_adapter.on_output[0]
        if not part.is_direct or type(part.delta).forward_rows.__func__ is Delta.forward_rows.__func__:  # type: ignore[attr-defined]
            return None
        slots.append(len(deltas))
        deltas.append(part.delta)
    if not deltas or len({type(d) for d in deltas}) > 1:
        return None
    return _BatchedDelta(type(deltas[0]), deltas, slots)
