"""Neighboring terms joined where their Deltas can be one: LoRA parts of a Mix or a Mixture, or neighbors in a Stack.

What adds to a module's output and reads only its input adds up in any order. So such adapters, each with its weight and
strength, become one Delta per site (`Delta.join`), which reads their values, and weights that are trained, at every
call. It knows terms and `Delta.join`, and nothing of what a joined Delta computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial

from torch import Tensor

from kitout import fast
from kitout.delta import PartWeight
from kitout.runtime.modules.composed import ComposedTerm
from kitout.runtime.modules.module_adapter import ModuleAdapter, SiteDelta
from kitout.runtime.modules.terms import Single, SumOfRuns, Term, TermSequence, WeightedSum

Addends = list[tuple[SiteDelta, PartWeight]]


class Joined(Single):
    """Several adapters as a single one."""

    def __init__(self, module_adapter: ModuleAdapter, addends: Addends) -> None:
        super().__init__(module_adapter)
        self.addends = addends


def fuse(term: Term) -> Term:
    """The same map with as few Deltas as possible."""
    if not fast.enabled():
        return term
    if isinstance(term, TermSequence):
        terms: list[Term] = []
        for inner in map(fuse, term.terms):
            joined = _join([(terms[-1], 1.0), (inner, 1.0)]) if terms else None
            if joined is None:
                terms.append(inner)
            else:
                terms[-1] = joined
        return terms[0] if len(terms) == 1 else TermSequence(terms)
    if isinstance(term, WeightedSum):
        weighted = [(fuse(inner), weight) for inner, weight in term.terms]
        addable = [(inner, weight) for inner, weight in weighted if _addends(inner)]
        joined = _join(addable)
        if joined is not None:
            rest = [(inner, weight) for inner, weight in weighted if not _addends(inner)]
            if not rest:
                return joined
            weighted = [(joined, 1.0), *rest]
        return SumOfRuns(weighted) if isinstance(term, SumOfRuns) else WeightedSum(weighted)
    if isinstance(term, ComposedTerm) and (weights := term.weight_functions()) is not None:
        parts = [(part, weight) for part, weight in zip(term.parts, weights, strict=True) if part is not None]
        return _join(parts) or term  # its parts are as short as they can be
    return term


def _addends(term: Term) -> Addends:
    """What the term adds, if all it does is to add to the output what can be joined."""
    if isinstance(term, Joined):
        return term.addends
    if not isinstance(term, Single):
        return []
    m = term.module_adapter
    if m.on_input or m.on_parameters or m.on_weights:
        return []
    can_join = all(p.relay is None and type(p.delta).join([(p.delta, 1.0)]) is not None for p in m.on_output)
    return [(part, m.strength) for part in m.on_output] if can_join else []


def _join(weighted: Sequence[tuple[Term, PartWeight]]) -> Joined | None:
    """One adapter for all of these; None where one of them cannot join, or all weights are 0."""
    addends: Addends = []
    for term, weight in weighted:
        of_term = _addends(term)
        if not of_term:
            return None
        addends += [(part, _product(weight, strength)) for part, strength in of_term]
    by_site: dict[object, Addends] = {}
    for part, weight in addends:
        if weight:
            by_site.setdefault((part.site.channels, type(part.delta)), []).append((part, weight))
    parts = []
    for group in by_site.values():
        joined = copy(group[0][0])  # with its view of the frozen module
        delta = type(joined.delta).join([(part.delta, weight) for part, weight in group])
        if delta is None:
            return None
        joined.delta = delta
        parts.append(joined)
    if not parts:
        return None
    first = weighted[0][0].module_adapters[0]
    return Joined(replace(first, on_output=tuple(parts), strength=1.0), addends)


def _product(first: PartWeight, second: PartWeight) -> PartWeight:
    """Of two weights; a function where one of them is."""
    if callable(first) or callable(second):
        return partial(_product_now, first, second)
    return first * second


def _product_now(first: PartWeight, second: PartWeight) -> Tensor:
    product = (first() if callable(first) else first) * (second() if callable(second) else second)
    assert isinstance(product, Tensor)
    return product
