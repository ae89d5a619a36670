"""Rows of one batch whose Deltas at a site are of one class, with a form for all of them at once.

`Delta.forward_rows` changes a frozen output; in training `Delta.fused_rows` computes frozen linears and their changes
together, of one site or of several that read one tensor. It knows neither what they compute nor which rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kitout import fast
from kitout.delta import Delta
from kitout.runtime.modules.shared_input import Linear
from kitout.runtime.modules.terms import Single, Term

DealRows = Callable[[int], tuple[int, ...]]  # the entry of each row, of so many rows


class BatchedDelta:
    """The batched fast path of a site: every term that is there is one plain Delta of one class.

    slots: by entry the number of its Delta, below 0 where it has none.
    """

    def __init__(self, cls: type[Delta], deltas: Sequence[Delta], slots: Sequence[int], deal_rows: DealRows) -> None:
        self.cls, self.deltas, self.slots, self.deal_rows = cls, tuple(deltas), tuple(slots), deal_rows
        self.is_fusable = cls.fused_rows.__func__ is not Delta.fused_rows.__func__  # type: ignore[attr-defined]
        self._rows: dict[int, tuple[int, ...]] = {}
        self._cache: dict[int, dict[str, Any]] = {}

    @property
    def fusing_key(self) -> tuple[object, ...]:
        """Sites of the same key may compute together, if they read one tensor."""
        return self.cls, self.slots, self.deal_rows

    def rows(self, n: int) -> tuple[int, ...]:
        """By row the number of its Delta, of n rows."""
        if torch.compiler.is_compiling():
            return self._deal(n)
        if n not in self._rows:
            self._rows[n] = self._deal(n)
        return self._rows[n]

    def _deal(self, n: int) -> tuple[int, ...]:
        return tuple(self.slots[e] for e in self.deal_rows(n))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        if not fast.enabled():
            return None
        n = x.shape[0]
        return self.cls.forward_rows(self.deltas, self.rows(n), x, y, _cache_of(self._cache, n))


class FusedRows:
    """Frozen linears and their rows' changes as one computation. sites: whose linears they are, of one fusing key."""

    def __init__(self, sites: Sequence[BatchedDelta]) -> None:
        self.first = sites[0]
        self.deltas = list(zip(*(site.deltas for site in sites), strict=True))  # by map, of each linear
        self._cache: dict[int, dict[str, Any]] = {}

    def __call__(self, x: Tensor, linears: Sequence[Linear]) -> list[Tensor] | None:
        n = x.shape[0]
        return self.first.cls.fused_rows(self.deltas, self.first.rows(n), x, linears, _cache_of(self._cache, n))


def _cache_of(caches: dict[int, dict[str, Any]], n: int) -> dict[str, Any]:
    """What is kept for n rows. A graph keeps nothing: what its first call finds would be a condition of it."""
    return {} if torch.compiler.is_compiling() else caches.setdefault(n, {})


def batched_delta_of(terms: Sequence[Term | None], deal_rows: DealRows) -> BatchedDelta | None:
    """None where some entry does more than one plain Delta, or they are of several classes."""
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
    return BatchedDelta(type(deltas[0]), deltas, slots, deal_rows)
