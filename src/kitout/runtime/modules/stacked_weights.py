"""The frozen module as the adapters below have left it: what a Delta that reads weights sees inside a stack.

DoRA on top of another adapter renormalises the sum of the base's weight and that adapter's change, so that wearing the
stack is merging it. Adapters below that have no form in weights change values only and are passed over. It knows no
method: only terms and how merging folds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from torch import Tensor

from kitout.base.site import Site
from kitout.base.weights import Frozen, bias, matrix
from kitout.errors import NotMergeable
from kitout.runtime.merge.fold import Pair, fold_local, lerp, working
from kitout.runtime.modules.module_adapter import Local, Part
from kitout.runtime.modules.programs import Blend, Chain, One, Term


class Beneath(Frozen):
    """The view of a site with terms folded in, computed when it is asked for: their values may be in training."""

    def __init__(self, site: Site, below: Sequence[Term]) -> None:
        super().__init__(site)
        self.below = tuple(below)

    @property
    def weight(self) -> Tensor:
        w = self._pair()[0]
        return w if self.site.span is None else w[self.site.span]

    @property
    def bias(self) -> Tensor | None:
        b = self._pair()[1]
        return b if b is None or self.site.span is None else b[self.site.span]

    def _pair(self) -> Pair:
        w, b = matrix(self.site.module), bias(self.site.module)
        start: Pair = w.to(working(w)), None if b is None else b.to(working(w))
        pair = start
        for term in self.below:
            pair = _fold(term, pair, start)
        return pair[0], None if pair[1] is None else pair[1].to(w.dtype)


def _fold(term: Term, pair: Pair, start: Pair) -> Pair:
    """The module's weight and bias with one term folded in, as far as it has a form in weights."""
    if isinstance(term, One):
        try:
            return fold_local(term.local, pair, start)
        except NotMergeable:
            return pair
    if isinstance(term, Chain):
        for inner in term.terms:
            pair = _fold(inner, pair, start)
        return pair
    assert isinstance(term, Blend)
    old = new = pair
    for inner, weight in term.terms:
        w, b = lerp(old, _fold(inner, old, start), weight)
        shift = _minus(b, old[1])
        new = new[0] + (w - old[0]), new[1] if shift is None else shift if new[1] is None else new[1] + shift
    return new


def _minus(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    return new if new is None or old is None else new - old


def raised(local: Local, below: Sequence[Term]) -> Local:
    """An adapter's parts at one module for use on top of these terms."""
    if not below or not any(_reads(p) for p in local.outs):
        return local
    outs = []
    for part in local.outs:
        if _reads(part):
            part = copy(part)
            part.frozen = Beneath(part.site, below)
        outs.append(part)
    return replace(local, outs=tuple(outs))


def _reads(part: Part) -> bool:
    return part.frozen is not None and not part.delta.replaces and part.site.kind in ("linear", "conv", "embedding")
