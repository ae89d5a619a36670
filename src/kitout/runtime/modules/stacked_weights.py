"""The frozen module as the adapters before it in a Stack left it: what a Delta that reads weights sees there.

DoRA on top of another adapter normalizes the sum of the base's weight and that adapter's change, so that using the
Stack equals merging it. Adapters before it that have no form in weights change values only and are passed over. It
knows no method: only terms and how merging folds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from torch import Tensor

from kitout.base.site import Site
from kitout.base.weights import FrozenModule, bias, weight_matrix
from kitout.runtime.merge.fold import fold_term
from kitout.runtime.merge.pairs import WeightBias, working_dtype
from kitout.runtime.modules.module_adapter import ModuleAdapter, SiteDelta
from kitout.runtime.modules.terms import Term


class StackedFrozenModule(FrozenModule):
    """The view of a site with terms folded in, computed when it is asked for: their values may be in training."""

    def __init__(self, site: Site, stacked_on: Sequence[Term]) -> None:
        super().__init__(site)
        self.stacked_on = tuple(stacked_on)

    @property
    def weight(self) -> Tensor:
        w = self._weight_bias()[0]
        index = self.site.channels_on(w.device)
        return w if index is None else w[index]

    @property
    def bias(self) -> Tensor | None:
        b = self._weight_bias()[1]
        index = None if b is None else self.site.channels_on(b.device)
        return b if b is None or index is None else b[index]

    def _weight_bias(self) -> WeightBias:
        w, b = weight_matrix(self.site.module), bias(self.site.module)
        start: WeightBias = w.to(working_dtype(w)), None if b is None else b.to(working_dtype(w))
        pair = start
        for term in self.stacked_on:
            pair = fold_term(term, pair, start, skips_unfoldable=True)
        return pair[0], None if pair[1] is None else pair[1].to(w.dtype)


def on_top_of(module_adapter: ModuleAdapter, stacked_on: Sequence[Term]) -> ModuleAdapter:
    """An adapter's parts at one module for use on top of these terms."""
    if not stacked_on or not any(_reads_weight(p) for p in module_adapter.on_output):
        return module_adapter
    outs = []
    for part in module_adapter.on_output:
        if _reads_weight(part):
            part = copy(part)
            part.frozen = StackedFrozenModule(part.site, stacked_on)
        outs.append(part)
    return replace(module_adapter, on_output=tuple(outs))


def _reads_weight(part: SiteDelta) -> bool:
    return (
        part.frozen is not None and not part.delta.replaces_module and part.site.kind in ("linear", "conv", "embedding")
    )
