"""Folding: adapters computed into the weights of the modules they sit at, as a Stack or a Mix of them runs.

In fp32 (fp64 for an fp64 base), cast to the base's dtype once by whoever writes them. It changes no model and knows no
method: only `Delta.fold`, the terms of a route, and `base.weights` for how weights are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kitout.base import weights
from kitout.base.norm_gains import fold_into_norm
from kitout.base.own_forward import check_blends, swapped_parameters, unhooked_forward
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import Errors, NotMergeable
from kitout.route import RouteEntry, simplify
from kitout.runtime.adapter import Adapter
from kitout.runtime.head import BLENDED, Head
from kitout.runtime.merge.foldable import check_foldable, describe, expand_foldable
from kitout.runtime.merge.pairs import WeightBias, add_change, fold_adapter, working_dtype
from kitout.runtime.modules.composed import ComposedTerm
from kitout.runtime.modules.module_adapter import ModuleAdapter, SiteDelta
from kitout.runtime.modules.terms import Single, SumOfRuns, Term, TermSequence, WeightedSum, build_term

MATRICES = ("linear", "conv", "embedding")
MOST_ERRORS = 8


@dataclass
class FoldedWeights:
    """The new values of one module."""

    parameters: dict[str, Tensor]
    """Parameters by name; names may be of its children's."""
    head: nn.Module | None = None
    """The module that takes its place."""


@torch.no_grad()
def fold_all(
    adapters_by_name: Mapping[str, Adapter], entry: RouteEntry, survey: Survey | None = None
) -> dict[str, FoldedWeights]:
    """New weights for every module the entry's adapters sit at; all errors collected, NotMergeable raised once.

    survey: the model's, which an `Only` counts its layers by.
    """
    described = describe(entry)
    entry, adapters = expand_foldable(simplify(entry), adapters_by_name, survey)
    errors = Errors(NotMergeable, f"cannot merge {described}")
    check_foldable(adapters, errors)
    errors.raise_if_any()
    folder = ModuleFolder(adapters, entry)
    folded: dict[str, FoldedWeights] = {}
    for path in folder.paths:
        try:
            folded[path] = folder.fold(path)
        except NotMergeable as reason:
            errors.add(f"{path} ({', '.join(folder.module_adapters(path))}): {reason}")
    errors.shorten(MOST_ERRORS, "modules")
    errors.raise_if_any()
    return folded


class ModuleFolder:
    """Folds an entry's adapters one module at a time, in the order of `paths`."""

    paths: list[str]
    """The modules they sit at; those whose parameters are changed from outside come after what changes them."""

    def __init__(self, adapters: Sequence[Adapter], entry: RouteEntry) -> None:
        self.adapters, self.entry = adapters, simplify(entry)
        paths = dict.fromkeys(path for adapter in adapters for path in adapter.by_module)
        self.paths = sorted(paths, key=lambda p: any(_has_values(a.by_module[p]) for a in adapters if p in a.by_module))
        self._of_parents: dict[str, Tensor] = {}  # by full name: what is changed from outside the module that holds it

    def module_adapters(self, path: str) -> dict[str, ModuleAdapter]:
        """What the adapters do at one module, by name."""
        return {a.name: a.by_module[path] for a in self.adapters if path in a.by_module}

    def acts_on_values(self, path: str) -> bool:
        """Something there acts on what the module takes or gives, not only on parameters (which may be others')."""
        return any(map(_has_values, self.module_adapters(path).values()))

    def replacing_head(self, path: str) -> nn.Module | None:
        """The head that, as it is, takes the module's place; None where there is none."""
        term = self._term(path)
        return None if term is None else _replacing_head(term)

    @torch.no_grad()
    def fold(self, path: str) -> FoldedWeights:
        """The module's new weights; NotMergeable where there are none."""
        term = self._term(path)
        if term is None:
            return FoldedWeights({})  # its changes cancel here
        changed = self.changed_from_outside(path)
        new = _fold_module(term, list(self.module_adapters(path).values()), changed)
        if not self.acts_on_values(path):
            inside = f"{path}." if path else ""
            self._of_parents |= {inside + name: value for name, value in new.parameters.items()}
        return new

    def changed_from_outside(self, path: str) -> dict[str, Tensor]:
        """What folds of other modules, so far, have made of this one's parameters."""
        inside = f"{path}." if path else ""
        return {n.removeprefix(inside): v for n, v in self._of_parents.items() if n.startswith(inside)}

    def _term(self, path: str) -> Term | None:
        module_adapters = self.module_adapters(path)
        singles = {name: Single(module_adapter) for name, module_adapter in module_adapters.items()}
        there = simplify(self.entry, singles.__contains__)
        return build_term(there, partial(_single_of, singles), partial(_fixed_sum, module_adapters))


def _single_of(singles: Mapping[str, Single], name: str, _: Sequence[Term]) -> Term:
    return singles[name]


def _fixed_sum(
    module_adapters: Mapping[str, ModuleAdapter], name: str, parts: Sequence[Term | None], _: Sequence[Term]
) -> Term:
    return ComposedTerm(module_adapters[name], parts).as_weighted_sum()


def _has_values(module_adapter: ModuleAdapter) -> bool:
    """It acts on what the module takes or gives, not only on its parameters."""
    return bool(module_adapter.on_input or module_adapter.on_output)


def _fold_module(term: Term, module_adapters: Sequence[ModuleAdapter], changed: Mapping[str, Tensor]) -> FoldedWeights:
    """The module's new parameters. changed: those that are changed already, from outside the module."""
    parts = [part for m in module_adapters for part in (*m.on_output, *m.on_input)]
    site = parts[0].site if parts else module_adapters[0].site
    if (head := _replacing_head(term)) is not None:
        return FoldedWeights({}, head=head)
    if any(m.on_weights for m in module_adapters):
        return FoldedWeights(_fold_read_weights(term, module_adapters, changed))
    if any(isinstance(part.delta, Head) for part in parts):
        if unhooked_forward(site.module) is not nn.Linear.forward:
            raise NotMergeable(BLENDED)
        site = site.replace(kind="linear")
    with swapped_parameters(site.module, changed):
        for part in _blended_copies(term):
            check_blends(site.module, site.d_in, part.delta.parameter_values() or {})
        if site.kind in MATRICES:
            return FoldedWeights(_fold_matrix(site, term, module_adapters))
        return FoldedWeights(_fold_parameters(site, term, module_adapters))


def _replacing_head(term: Term) -> nn.Module | None:
    """What acts last, if it is a head at strength 1: nothing of the module remains."""
    while isinstance(term, TermSequence):
        term = term.terms[-1]
    if not isinstance(term, Single) or term.module_adapter.strength != 1.0 or not term.module_adapter.on_output:
        return None
    delta = term.module_adapter.on_output[-1].delta
    return delta.module if isinstance(delta, Head) else None


def _fold_read_weights(
    term: Term, module_adapters: Sequence[ModuleAdapter], changed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights that a module multiplies by itself, by name, and whatever other parameters of it are changed."""
    start: dict[str, Tensor] = {}
    for m in module_adapters:
        for part in (*m.on_output, *m.on_input):
            raise NotMergeable(f"{type(part.delta).__name__} acts on what is computed by weights that are read here")
        for part in m.on_weights:
            start |= part.read_values()
        for part in m.on_parameters:
            start |= {n: changed.get(n, part.site.module.get_parameter(n)) for n in part.site.parameter_names}
    start = {name: value.detach().to(working_dtype(value)) for name, value in start.items()}
    new = term.map_weights(term.map_parameters(start)[0])
    return {name: value for name, value in new.items() if not torch.equal(value, start[name])}


def _blended_copies(term: Term, is_mixed: bool = False) -> list[SiteDelta]:
    """The parts that replace the module, but not as a whole."""
    if isinstance(term, Single):
        strength, parts = term.module_adapter.strength, term.module_adapter.on_output
        return [p for p in parts if p.delta.replaces_module and (is_mixed or strength not in (0.0, 1.0))]
    if isinstance(term, TermSequence):
        return [part for inner in term.terms for part in _blended_copies(inner, is_mixed)]
    assert isinstance(term, WeightedSum)
    return [part for inner, _ in term.terms for part in _blended_copies(inner, True)]


def _fold_matrix(site: Site, term: Term, module_adapters: Sequence[ModuleAdapter]) -> dict[str, Tensor]:
    """The new parameters of a linear, a convolution or a table."""
    module = site.module
    parts = [part for m in module_adapters for part in (*m.on_output, *m.on_input)]
    copies = [part.delta.replaces_module for part in parts]
    scale = 1.0 if all(copies) else weights.linear_scale(site)  # a whole copy is exact anywhere
    names = dict.fromkeys(n for m in module_adapters for part in m.on_parameters for n in part.site.parameter_names)
    own = {name: (p := module.get_parameter(name)).to(working_dtype(p)) for name in names}
    if own and isinstance(term, SumOfRuns) and scale == 1.0:
        new = start = _matrix_with(module, {})
        for inner, weight in term.terms:
            with_own = _matrix_with(module, _same_in_all_runs(inner, own))
            new = add_change(new, start, fold_term(inner, with_own, with_own), weight)
        return weights.parameters_for_matrix(module, new, start)
    swapped = _same_in_all_runs(term, own)
    start = _matrix_with(module, swapped)
    with swapped_parameters(module, swapped):
        if scale == 1.0:
            new = fold_term(term, start, start)
        else:
            new = _fold_scaled_table(site, term, start[0], scale, any(copies)), None
        return swapped | weights.parameters_for_matrix(module, new, start)


def _same_in_all_runs(term: Term, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's own parameters under a term; NotMergeable where its runs have different ones."""
    first, *others = term.map_parameters(own)
    if any(not torch.equal(other[name], first[name]) for other in others for name in own):
        raise NotMergeable(
            f"{', '.join(own)} trained whole, in a Mix with an adapter that changes what the module gives: no one "
            "weight is what both have in a Stack; merge the Mix by itself"
        )
    return first


def _matrix_with(module: nn.Module, values: Mapping[str, Tensor]) -> WeightBias:
    """The module's weight [d_out, d_in] and bias where it has these values for its parameters."""
    with swapped_parameters(module, values):
        w, b = weights.weight_matrix(module), weights.bias(module)
        return w.to(working_dtype(w)), None if b is None else b.to(working_dtype(w))


def _fold_scaled_table(site: Site, term: Term, w: Tensor, scale: float, has_copies: bool) -> Tensor:
    """A table [d, V] whose module multiplies it by a scale: adapters act on the product, the weight takes its part."""
    if has_copies:
        raise NotMergeable(f"a table that is scaled by {scale:g} is replaced and changed at once")
    w_folded, b_folded = fold_term(term, (scale * w, None), (scale * w, None))
    product = w_folded if b_folded is None else w_folded + b_folded[:, None]
    x = torch.arange(min(8, w.shape[1]), device=w.device)
    y = term.map_output(term.map_input(x)[1], [(scale * w[:, x]).T], False)
    if not torch.allclose(y, product[:, x].T, rtol=1e-4, atol=1e-5 * float(y.abs().max())):
        raise NotMergeable(f"{type(site.module).__name__} scales by {scale:g} what this adapter takes without a scale")
    return w + (product - scale * w) / scale


def fold_term(term: Term, pair: WeightBias, start: WeightBias, skips_unfoldable: bool = False) -> WeightBias:
    """One term on the weight and bias that are there. start: the frozen ones, for a Delta that replaces the module.

    skips_unfoldable: adapters that have no form in weights leave them as they are.
    """
    if isinstance(term, Single):
        try:
            return fold_adapter(term.module_adapter, pair, start)
        except NotMergeable:
            if skips_unfoldable:
                return pair
            raise
    if isinstance(term, TermSequence):
        for inner in term.terms:
            pair = fold_term(inner, pair, start, skips_unfoldable)
        return pair
    if isinstance(term, ComposedTerm):
        try:
            return fold_term(term.as_weighted_sum(), pair, start, skips_unfoldable)
        except NotMergeable:
            if skips_unfoldable:
                return pair
            raise
    assert isinstance(term, WeightedSum)
    new = pair
    for inner, weight in term.terms:
        new = add_change(new, pair, fold_term(inner, pair, start, skips_unfoldable), weight)
    return new


def _fold_parameters(site: Site, term: Term, module_adapters: Sequence[ModuleAdapter]) -> dict[str, Tensor]:
    """The parameters, by name, of a norm or of a module that is no matrix either."""
    own = [n for n, _ in site.module.named_parameters(recurse=False)]
    trained = [n for m in module_adapters for part in m.on_parameters for n in part.site.parameter_names]
    parameters = {n: site.module.get_parameter(n) for n in (*own, *trained)}
    start = {n: p.to(working_dtype(p)) for n, p in parameters.items() if p.is_floating_point()}
    now = _fold_values(term, start, start)
    return {n: v for n, v in now.items() if v is not start.get(n)}


def _fold_values(term: Term, now: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, after one term."""
    if isinstance(term, TermSequence):
        for inner in term.terms:
            now = _fold_values(inner, now, start)
        return now
    if isinstance(term, WeightedSum):
        new = dict(now)
        for inner, weight in term.terms:
            for n, value in _fold_values(inner, now, start).items():
                if value is not now.get(n):
                    old = now.get(n, torch.zeros_like(value))
                    new[n] = new.get(n, old) + weight * (value - old)
        return new
    assert isinstance(term, Single)
    module_adapter = term.module_adapter
    if module_adapter.on_input:
        raise NotMergeable(
            f"{type(module_adapter.on_input[0].delta).__name__} acts on the input of a module that is no linear"
        )
    new = now
    for part in (*module_adapter.on_output, *module_adapter.on_parameters):
        new = _fold_value(part, start if part.delta.replaces_module else new)
    if module_adapter.strength != 1.0:
        new = {n: torch.lerp(now.get(n, torch.zeros_like(v)), v, module_adapter.strength) for n, v in new.items()}
    return new


def _fold_value(part: SiteDelta, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, after one Delta: whole values, or scale and shift folded into a norm."""
    site, delta = part.site, part.delta
    values = delta.parameter_values()
    if values is not None:
        return parameters | {n: v.to(parameters[n].dtype) for n, v in values.items()}
    if site.kind != "norm" or not delta.is_scale_shift:
        raise NotMergeable(f"{type(delta).__name__} has no place in a {type(site.module).__name__}")
    if "weight" not in parameters:
        raise NotMergeable(f"{type(site.module).__name__} has no gain")
    one = torch.ones_like(parameters["weight"])
    scale, shift = delta.fold(one[:, None], None)
    return fold_into_norm(site.module, parameters, scale[:, 0], shift)
