"""A Mix at a module whose input some of its adapters change, folded as `terms.WeightedSum` computes it.

There the module sees the mixed input, while every adapter's output part reads the input as that adapter left it. So an
input is kept as a weighted sum of chains of input Deltas, and what an output part adds of its x is composed with its
own. It knows terms and pairs of weight and bias, and nothing of names or models.
"""

from __future__ import annotations

from typing import Any

import torch

from kitout.errors import NotMergeable
from kitout.runtime.merge.pairs import WeightBias, add_change, blend, fold_in
from kitout.runtime.modules.module_adapter import ModuleAdapter, SiteDelta
from kitout.runtime.modules.terms import Single, Term, TermSequence, WeightedSum

Input = tuple[tuple[float, tuple[SiteDelta, ...]], ...]
"""x' = sum of weights times x after a chain of Deltas; the weights add up to 1."""
IDENTITY: Input = ((1.0, ()),)
TOLERANCE = 1e-5


def fold_sum(term: WeightedSum, pair: WeightBias, start: WeightBias) -> WeightBias:
    """The term on the weight and bias that are there. start: the frozen ones."""
    x, memo = _map_input(term, IDENTITY)
    return _map_output(term, memo, _compose(pair, x), start)


def _map_input(term: Term, x: Input) -> tuple[Input, Any]:
    if isinstance(term, Single):
        strength, deltas = term.module_adapter.strength, term.module_adapter.on_input
        if not deltas or strength == 0.0:
            return x, x
        mapped: Input = tuple((strength * weight, (*chain, *deltas)) for weight, chain in x)
        new = mapped if strength == 1.0 else (*mapped, *(((1.0 - strength) * weight, chain) for weight, chain in x))
        return new, new
    if isinstance(term, TermSequence):
        memos = []
        for inner in reversed(term.terms):
            x, memo = _map_input(inner, x)
            memos.append(memo)
        return x, memos[::-1]
    assert isinstance(term, WeightedSum)
    new, memos, rest = (), [], 1.0
    for inner, weight in term.terms:
        inner_x, memo = _map_input(inner, x)
        memos.append(memo)
        if inner_x is not x:
            new = (*new, *((weight * w, chain) for w, chain in inner_x))
            rest -= weight
    return (*new, *((rest * w, chain) for w, chain in x if rest)), memos


def _map_output(term: Term, memo: Any, y: WeightBias, start: WeightBias) -> WeightBias:
    """y: the value that the term is given, as a map of the module's input before all."""
    if isinstance(term, Single):
        return _fold_outputs(term.module_adapter, memo, y, start)
    if isinstance(term, TermSequence):
        for inner, inner_memo in zip(term.terms, memo, strict=True):
            y = _map_output(inner, inner_memo, y, start)
        return y
    assert isinstance(term, WeightedSum)
    new = y
    for (inner, weight), inner_memo in zip(term.terms, memo, strict=True):
        new = add_change(new, y, _map_output(inner, inner_memo, y, start), weight)
    return new


def _fold_outputs(module_adapter: ModuleAdapter, x: Input, y: WeightBias, start: WeightBias) -> WeightBias:
    if module_adapter.strength == 0.0:
        return y
    new = y
    for part in module_adapter.on_output:
        if part.delta.replaces_module:
            new = _compose(part.fold(*start), x)
            continue
        zero = torch.zeros_like(new[0]), None if new[1] is None else torch.zeros_like(new[1])
        of_x, before = part.fold(*zero), new
        new = part.fold(*before)
        if not part.delta.is_scale_shift:
            _check_affine(part, of_x, before, new)
            added = of_x[0], None
            new = add_change(new, added, _compose(added, x), 1.0)
    return blend(y, new, module_adapter.strength)


def _check_affine(part: SiteDelta, at_zero: WeightBias, y: WeightBias, new: WeightBias) -> None:
    """NotMergeable where the Delta reads the weight itself, so that it is not the same map over another input."""
    twice = part.fold(2 * y[0], None if y[1] is None else 2 * y[1])[0]
    if not (twice - 2 * new[0] + at_zero[0]).abs().max() <= TOLERANCE * new[0].abs().max():
        raise NotMergeable(
            f"{type(part.delta).__name__} depends on the weight itself, in a Mix with an adapter of the module's input"
        )


def _compose(pair: WeightBias, x: Input) -> WeightBias:
    """The map after this input."""
    if x == IDENTITY:
        return pair
    new: WeightBias = torch.zeros_like(pair[0]), pair[1]
    for weight, chain in x:
        changed: WeightBias = pair[0], None
        for part in reversed(chain):
            changed = fold_in(part, changed)
        nothing: WeightBias = torch.zeros_like(pair[0]), None
        new = add_change(new, nothing, changed, weight)
    return new
