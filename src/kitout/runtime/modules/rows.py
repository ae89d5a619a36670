"""Rows: one batch whose rows have different adapters.

A plan says which row has which distinct entry; the program of a module gives each entry's rows their own term. Rows
whose Deltas have a batched form go through it together; the others are gathered, mapped and put back. It knows terms
and indices, and nothing of names, methods or where modules sit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kitout import fast
from kitout.base.own_forward import swapped_parameters
from kitout.base.weights import FrozenModule
from kitout.device_constants import constant, may_keep
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, first_tensor, replace_first_tensor
from kitout.runtime.modules.batched_rows import FusedRows, batched_delta_of
from kitout.runtime.modules.module_adapter import Relay
from kitout.runtime.modules.programs import check_no_state, parameters_now, repack_output, unpack_output
from kitout.runtime.modules.shared_input import FusedLinears, SharedInput, frozen_linear
from kitout.runtime.modules.terms import Term


class RowPlan:
    """Which row has which entry, and the index tensors for every multiple of the batch a site may see."""

    def __init__(self, entries: Sequence[int], num_distinct: int) -> None:
        self.entries, self.size, self.num_distinct = tuple(entries), len(entries), num_distinct
        self.batch = self.size  # rows of the call in progress: beams make it a multiple
        self._is_sorted = list(entries) == sorted(entries)
        self.is_exact = True  # a site with one value per row has exactly these; False where beams begin on their own
        self.refusal = ""  # why the call in progress cannot be dealt to rows
        self._index: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}

    def index(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """Row numbers of each distinct entry where dim 0 has `rows` values, a multiple of the batch, row-major."""
        self.check()
        if not may_keep():  # what is kept would be a condition of a graph
            return self._new_index(rows, device)
        key = rows, device
        if key not in self._index:
            self._index[key] = self._new_index(rows, device)
        return self._index[key]

    def _new_index(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        entries = self.repeat_to(rows)
        rows_of = [tuple(r for r, e in enumerate(entries) if e == i) for i in range(self.num_distinct)]
        return tuple(constant(each, device, torch.long) for each in rows_of)

    @property
    def is_sorted(self) -> bool:
        """The rows of each entry are neighbors, in the order of entries: they are taken and put back without a copy."""
        return self._is_sorted and fast.enabled()

    def split(self, value: Tensor) -> Sequence[Tensor]:
        """The rows of each distinct entry; views, where the plan is sorted, that may not be written to."""
        if not self.is_sorted:
            return [value[rows] for rows in self.index(value.shape[0], value.device)]
        self.check()
        each = value.shape[0] // self.size
        return value.split([self.entries.count(entry) * each for entry in range(self.num_distinct)])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What `split` has taken apart, in the order of rows."""
        if self.is_sorted:
            return torch.cat(tuple(parts))
        n = sum(len(part) for part in parts)
        return scatter(parts, self.index(n, parts[0].device))

    def check(self, path: str = "this tower") -> None:
        """RouteError where the call in progress cannot be dealt to rows."""
        if self.refusal:
            raise RouteError(
                f"{path} sees images, videos or sounds, not rows, and which row each belongs to cannot be followed: "
                f"{self.refusal}. Give every row one of one size, give all rows the same adapter here, or call the "
                "rows apart"
            )

    def repeat_to(self, rows: int) -> tuple[int, ...]:
        k = rows // self.size
        return tuple(e for e in self.entries for _ in range(k))


class PerRow:
    """One term per distinct entry of a batch; None where an entry has nothing here.

    Rows whose Delta has a batched form go through it together; the others are gathered, mapped and put back.
    """

    def __init__(
        self,
        row_plan: RowPlan,
        terms: Sequence[Term | None],
        path: str,
        batch_relation: str,
        relays: Sequence[Relay],
        call_views: Sequence[FrozenModule] = (),
    ) -> None:
        self.row_plan, self.terms, self.path, self.batch_relation = row_plan, tuple(terms), path, batch_relation
        self.relays, self.call_views = tuple(relays), tuple(call_views)
        self.maps_input = any(t is not None and t.maps_input for t in terms)
        self.num_runs = max(t.num_runs for t in terms if t is not None)
        self.batched_delta = None if self.maps_input else batched_delta_of(self.terms, row_plan.repeat_to)
        batched = self.batched_delta
        self.fused_rows = FusedRows([batched]) if batched is not None and batched.is_fusable else None
        self.shared_input: SharedInput | None = None  # the linears called with the same tensor, this number of which
        self.number = 0

    @property
    def fusing_key(self) -> object:
        """Programs of the same key may compute together, if they read one tensor; those of None may not."""
        batched = self.batched_delta
        return (*batched.fusing_key, self.batch_relation) if batched is not None and batched.is_fusable else None

    @staticmethod
    def fuse_with(programs: Sequence[Any]) -> FusedLinears:
        """Several of the same key as one computation."""
        return FusedRows([program.batched_delta for program in programs])

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        if self.batch_relation == "one":
            x = self._for_each_row(x)
            args, kwargs = replace_first_tensor(args, kwargs, x)
        self._check(x.shape[0])
        if self.batched_delta is not None:
            if self.fused_rows is not None and forward is nn.Linear.forward and fast.enabled():
                fused = None if self.shared_input is None else self.shared_input.output(self.number, x)
                if fused is None and (linear := frozen_linear(module, x)) is not None:
                    fused = next(iter(self.fused_rows(x, [linear]) or ()), None)
                if fused is not None:
                    return fused
            y, whole = unpack_output(forward(module, *args, **kwargs))
            batched = self.batched_delta(x, y)
            if batched is not None:
                return repack_output(batched, whole)
            return repack_output(self._map_output(x, (), [y], args, kwargs), whole)
        inputs, memos = self._map_input(x) if self.maps_input else ([x], ())
        if len(inputs) > 1:
            check_no_state(module, args, kwargs, "a Mix in a row runs it more than once; use its adapters in a Stack")
        outputs = []
        for entered in inputs:
            args, kwargs = replace_first_tensor(args, kwargs, entered)
            outputs.append(unpack_output(forward(module, *args, **kwargs)))
        ys = [self._for_each_row(y) if self.batch_relation == "one" else y for y, _ in outputs]
        return repack_output(self._map_output(x, memos, ys, args, kwargs), outputs[0][1])

    def _for_each_row(self, value: Tensor) -> Tensor:
        """What a position table is asked, or answers, once for all rows."""
        return value.expand(self.row_plan.batch, *value.shape[1:]) if value.shape[0] == 1 else value

    def _check(self, rows: int) -> None:
        check_rows(self.path, self.batch_relation, rows, self.row_plan)

    def _map_input(self, x: Tensor) -> tuple[list[Tensor], list[Any]]:
        """The inputs of all rows, run by run: rows whose term needs fewer runs than others repeat their last."""
        mapped = []
        for term, part in zip(self.terms, self.row_plan.split(x), strict=True):
            mapped.append(([part], None) if term is None else term.map_input(part))
        runs = [
            self.row_plan.join([inputs[min(i, len(inputs) - 1)] for inputs, _ in mapped]) for i in range(self.num_runs)
        ]
        return runs, [memo for _, memo in mapped]

    def _map_output(
        self, x: Tensor, memos: Sequence[Any], ys: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        parts = []
        plan = self.row_plan
        # A module may be given [rows, tokens, d] and answer with all tokens of all rows in one dimension.
        xs = plan.split(x)
        by_run = [plan.split(y) for y in ys]
        for i, (term, part) in enumerate(zip(self.terms, by_run[0], strict=True)):
            rows = len(part)
            if term is not None:
                with _relayed(self.relays, plan, i), _called_with(self.call_views, args, kwargs, plan, i, len(x)):
                    memo = memos[i] if self.maps_input else term.map_input(xs[i])[1]
                    own = [part, *(of_run[i] for of_run in by_run[1 : term.num_runs])]
                    part = term.map_output(memo, own, not plan.is_sorted)
                if not isinstance(part, Tensor):
                    raise RouteError(f"{self.path} gives several values, which a row cannot have of its own")
                if part.shape[0] != rows:  # one answer for all of them
                    part = part.expand(rows, *part.shape[1:])
            parts.append(part)
        for relay in self.relays:
            relay.value = None
        widths = {p.shape[1:] for p in parts}
        if len(widths) > 1:
            raise RouteError(
                f"{self.path}: rows of one batch come out with different shapes {sorted(map(tuple, widths))} "
                "(heads of different width?): run them in separate batches"
            )
        return self.row_plan.join(parts)


class PerRowWeights:
    """One term per distinct entry of a batch, each with weights of its own for a module that multiplies by them itself.

    The module runs once per entry on the whole batch, because only it knows which of its arguments belong to rows; each
    row is taken from the run of its entry. batch_axis: of the module's first output; of all others it is the first.
    """

    def __init__(
        self,
        row_plan: RowPlan,
        terms: Sequence[Term | None],
        names: Sequence[str],
        path: str,
        batch_relation: str,
        batch_axis: int,
        inner: PerRow | None = None,
    ) -> None:
        self.row_plan, self.terms, self.names, self.path = row_plan, tuple(terms), tuple(names), path
        self.batch_relation, self.batch_axis, self.inner = batch_relation, batch_axis, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.inner is not None:
            return self.inner(module, partial(self._run, forward), args, kwargs)
        return self._run(forward, module, *args, **kwargs)

    def _run(self, forward: ForwardFn, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        consequence = "rows cannot have different adapters where it multiplies by weights of its own; use one adapter "
        check_no_state(module, args, kwargs, f"{consequence}for the whole batch")
        now = parameters_now(module, self.names)
        outputs = []
        for term in self.terms:
            with swapped_parameters(module, {} if term is None else term.map_weights(now)):
                outputs.append(forward(module, *args, **kwargs))
        return self._select(outputs, self.batch_axis)

    def _select(self, values: Sequence[Any], axis: int) -> Any:
        """Each row of the value that its entry gave."""
        first = values[0]
        if isinstance(first, tuple):
            return tuple(self._select(same, 0 if i else axis) for i, same in enumerate(zip(*values, strict=True)))
        if not isinstance(first, Tensor):
            return first
        rows = first.shape[axis] if axis < first.ndim else 0
        check_rows(self.path, self.batch_relation if rows == self.row_plan.batch else "multiple", rows, self.row_plan)
        index = self.row_plan.index(rows, first.device)
        parts = [value.movedim(axis, 0)[own] for value, own in zip(values, index, strict=True)]
        return scatter(parts, index).movedim(0, axis)


def check_rows(path: str, batch_relation: str, rows: int, row_plan: RowPlan) -> None:
    """RouteError where what a module sees does not follow the batch."""
    row_plan.check(path)
    is_other = batch_relation == "batch" and row_plan.is_exact and rows != row_plan.batch
    if batch_relation == "none" or rows % row_plan.size or is_other:
        reason = (
            f"sees {rows} rows while the route names {row_plan.size}: its first dimension does not follow the batch"
            if rows != row_plan.size
            else "does not keep the rows of a batch apart, or keeps values of its last run"
        )
        raise RouteError(
            f"{path} {reason}, so rows cannot have different adapters here; use one adapter for the whole batch"
        )


@contextmanager
def _relayed(relays: Sequence[Relay], row_plan: RowPlan, entry: int) -> Iterator[None]:
    """The relays hold the values of the rows of one distinct entry alone."""
    if not relays:
        yield
        return
    values = [relay.value for relay in relays]
    try:
        for relay, value in zip(relays, values, strict=True):
            relay.value = None if value is None else row_plan.split(value)[entry]
        yield
    finally:
        for relay, value in zip(relays, values, strict=True):
            relay.value = value


@contextmanager
def _called_with(
    views: Sequence[FrozenModule], args: tuple[Any, ...], kwargs: dict[str, Any], plan: RowPlan, entry: int, batch: int
) -> Iterator[None]:
    """The views know the module's call, for the rows of one distinct entry alone."""
    if not views:
        yield
        return
    try:
        for view in views:
            rows = plan.index(batch, first_tensor(args, kwargs).device)[entry]
            view.call_args, view.call_kwargs = _select_rows((args, kwargs), rows, batch)
        yield
    finally:
        for view in views:
            view.clear_call()


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
