"""Terms: the map a route makes of one module, built from the adapters there.

A term is a single adapter, a sequence of terms or a weighted sum of them, with the two moments a module has:
`map_input` before it runs and `map_output` after. A sum may need several runs of the module: then both moments handle
one value per run. It knows nothing of methods or where modules sit, nor of how a module is called: that is in
`programs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import fsum, prod
from typing import Any, Protocol

from torch import Tensor

from kitout.base.own_forward import has_plain_forward
from kitout.route import Composed, Mix, RouteEntry, Stack
from kitout.runtime.modules.module_adapter import ModuleAdapter, check_blendable

ROUNDING = 1e-12  # a sum of weights this close to 1 is 1


class Term(Protocol):
    """A map of one module: `map_input(x) -> (input per run, memo)`, then `map_output(memo, value per run) -> y`."""

    @property
    def num_runs(self) -> int:
        """How often the module runs."""
        ...

    @property
    def maps_input(self) -> bool:
        """Whether `map_input` does anything."""
        ...

    @property
    def module_adapters(self) -> tuple[ModuleAdapter, ...]:
        """Every adapter in it, repeats included."""
        ...

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The module's own parameters, by name, as they are in each run."""
        ...

    def map_weights(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Port "weight": the parameters that the module multiplies by, the same in all runs."""
        ...

    def map_input(self, x: Tensor) -> tuple[list[Tensor], Any]: ...
    def map_output(self, memo: Any, ys: Sequence[Tensor], may_overwrite: bool) -> Tensor: ...


class Single:
    """A single adapter."""

    num_runs = 1

    def __init__(self, module_adapter: ModuleAdapter) -> None:
        self.module_adapter = module_adapter
        self.maps_input = bool(module_adapter.on_input) and module_adapter.strength != 0.0
        self.module_adapters = (module_adapter,)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        return [self.module_adapter.map_parameters(parameters)]

    def map_weights(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.module_adapter.map_weights(parameters)

    def map_input(self, x: Tensor) -> tuple[list[Tensor], Any]:
        new = self.module_adapter.map_input(x)
        return [new], new

    def map_output(self, memo: Any, ys: Sequence[Tensor], may_overwrite: bool) -> Tensor:
        return self.module_adapter.map_output(memo, ys[0], may_overwrite)


class TermSequence:
    """Adapters in order: each takes the module as the ones before it have left it (f_i = out_i . f_{i-1} . in_i).

    So a term runs what is before it as often as it would run the module. Runs of the first term are neighbors.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms, self.maps_input = tuple(terms), any(t.maps_input for t in terms)
        self.num_runs = prod(t.num_runs for t in terms)
        self.module_adapters = tuple(m for t in terms for m in t.module_adapters)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        runs = [dict(parameters)]
        for term in self.terms:
            runs = [run for same in zip(*map(term.map_parameters, runs), strict=True) for run in same]
        return runs

    def map_weights(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for term in self.terms:
            parameters = term.map_weights(parameters)
        return dict(parameters)

    def map_input(self, x: Tensor) -> tuple[list[Tensor], Any]:
        inputs, memos = [x], []
        for term in reversed(self.terms):
            mapped = [term.map_input(each) for each in inputs]
            inputs = [each for of_term, _ in mapped for each in of_term]
            memos.append([memo for _, memo in mapped])
        return inputs, memos[::-1]

    def map_output(self, memo: Any, ys: Sequence[Tensor], may_overwrite: bool) -> Tensor:
        for term, memos in zip(self.terms, memo, strict=True):
            n = term.num_runs
            new = [term.map_output(m, ys[i * n : (i + 1) * n], may_overwrite) for i, m in enumerate(memos)]
            may_overwrite = may_overwrite or not any(value is y for value in new for y in ys)
            ys = new
        return ys[0]


class WeightedSum:
    """y + sum_i w_i (term_i(y) - y), at the input and at the output of one run of the module."""

    num_runs = 1

    def __init__(self, terms: Sequence[tuple[Term, float]]) -> None:
        self.terms, self.maps_input = tuple(terms), any(t.maps_input for t, _ in terms)
        self.module_adapters = tuple(m for t, _ in terms for m in t.module_adapters)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        return [blend_parameters(parameters, [(term.map_parameters(parameters)[0], w) for term, w in self.terms])]

    def map_weights(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return blend_parameters(parameters, [(term.map_weights(parameters), w) for term, w in self.terms])

    def map_input(self, x: Tensor) -> tuple[list[Tensor], Any]:
        mapped = [(term.map_input(x), w) for term, w in self.terms]
        return [_blend(x, [(inputs[0], w) for (inputs, _), w in mapped])], [memo for (_, memo), _ in mapped]

    def map_output(self, memo: Any, ys: Sequence[Tensor], may_overwrite: bool) -> Tensor:
        values = [(term.map_output(m, ys, False), w) for (term, w), m in zip(self.terms, memo, strict=True)]
        return _blend(ys[0], values)


class SumOfRuns(WeightedSum):
    """f(x) + sum_i w_i (f_i(x) - f(x)), the module run once for each term that needs a run of its own.

    Terms that only change parameters share a run with blended parameters; terms that only change the output share that
    of the frozen module, which is left out where nothing of it remains.
    """

    def __init__(self, terms: Sequence[tuple[Term, float]]) -> None:
        super().__init__(terms)
        self.own_run = [(t, w) for t, w in terms if t.maps_input or (maps_parameters(t) and _maps_output(t))]
        rest = [(t, w) for t, w in terms if all(t is not own for own, _ in self.own_run)]
        of_parameters = [(t, w) for t, w in rest if maps_parameters(t)]
        self.on_output = [(t, w) for t, w in rest if not maps_parameters(t)]
        self.of_parameters = WeightedSum(of_parameters) if of_parameters else None
        frozen_weight = 1.0 - fsum([bool(of_parameters), *(w for _, w in self.own_run)])
        self.runs_frozen = bool(self.on_output) or abs(frozen_weight) > ROUNDING
        self.num_shared_runs = self.runs_frozen + bool(of_parameters)
        self.num_runs = self.num_shared_runs + sum(t.num_runs for t, _ in self.own_run)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        runs = [dict(parameters)] if self.runs_frozen else []
        if self.of_parameters is not None:
            runs += self.of_parameters.map_parameters(parameters)
        return runs + [run for term, _ in self.own_run for run in term.map_parameters(parameters)]

    def map_input(self, x: Tensor) -> tuple[list[Tensor], Any]:
        own = [term.map_input(x) for term, _ in self.own_run]
        inputs = [x] * self.num_shared_runs + [each for of_term, _ in own for each in of_term]
        return inputs, ([term.map_input(x)[1] for term, _ in self.on_output], [memo for _, memo in own])

    def map_output(self, memo: Any, ys: Sequence[Tensor], may_overwrite: bool) -> Tensor:
        shared, own = memo
        start, values = self.num_shared_runs, []
        if self.of_parameters is not None:
            values.append((ys[start - 1], 1.0))
        for (term, w), term_memo in zip(self.own_run, own, strict=True):
            values.append((term.map_output(term_memo, ys[start : start + term.num_runs], may_overwrite), w))
            start += term.num_runs
        if self.runs_frozen:
            values += [
                (term.map_output(m, ys[:1], False), w) for (term, w), m in zip(self.on_output, shared, strict=True)
            ]
            return _blend(ys[0], values)
        (first, weight), *others = values
        new = weight * first
        for value, w in others:
            new = new + w * check_blendable(value, first)
        return new


def _blend(old: Tensor, values: Sequence[tuple[Tensor, float]]) -> Tensor:
    """old + sum_i w_i (value_i - old)."""
    new = old
    for value, w in values:
        new = new if value is old else new + w * (check_blendable(value, old) - old)
    return new


def blend_parameters(
    old: Mapping[str, Tensor], values: Sequence[tuple[Mapping[str, Tensor], float]]
) -> dict[str, Tensor]:
    return {name: value + sum(w * (new[name] - value) for new, w in values) for name, value in old.items()}


SingleTerm = Callable[[str, Sequence[Term]], Term | None]
CombinedTerm = Callable[[str, Sequence[Term | None], Sequence[Term]], Term]


def build_term(
    entry: RouteEntry, single: SingleTerm, combined: CombinedTerm, stacked_on: Sequence[Term] = ()
) -> Term | None:
    """An entry's map at one module, or None where it has nothing there. The entry is simplified (`route.simplify`).

    single: a name's own term there, on top of the terms before it (stacked_on). combined: that of a composition, given
    those of its parts.
    """
    if entry is None:
        return None
    if isinstance(entry, str):
        return single(entry, stacked_on)
    if isinstance(entry, Composed):
        parts = [build_term(part, single, combined, stacked_on) for part in entry.parts]
        return combined(entry.name, parts, stacked_on)
    if isinstance(entry, Mix):
        weighted = [(build_term(part, single, combined, stacked_on), weight) for part, weight in entry.parts]
        present = [(term, weight) for term, weight in weighted if term is not None]
        return weighted_sum(present, stacked_on) if present else None
    assert isinstance(entry, Stack)
    terms: list[Term] = []
    for part in entry.parts:
        term = build_term(part, single, combined, [*stacked_on, *terms])
        if term is not None:
            terms.append(term)
    return terms[0] if len(terms) == 1 else TermSequence(terms) if terms else None


def weighted_sum(terms: Sequence[tuple[Term, float]], stacked_on: Sequence[Term] = ()) -> WeightedSum:
    """With one run where one run is exact.

    Inputs may be blended before a map that is affine, and what does not read the output may be added to any.
    """
    all_terms = [term for term, _ in terms]
    maps_input, changes_parameters = any(t.maps_input for t in all_terms), any(map(maps_parameters, all_terms))
    is_exact = all(t.num_runs == 1 for t in all_terms)
    if maps_input or changes_parameters:
        outputs = [p.delta for t in all_terms for m in t.module_adapters for p in m.on_output]
        is_exact = is_exact and not (maps_input and changes_parameters) and all(d.adds_linear_map for d in outputs)
    if maps_input:
        is_exact = is_exact and _is_affine(all_terms[0].module_adapters[0], stacked_on)
    return WeightedSum(terms) if is_exact else SumOfRuns(terms)


def _is_affine(module_adapter: ModuleAdapter, stacked_on: Sequence[Term]) -> bool:
    """The module, as the terms before have left it, is affine in its input."""
    if not has_plain_forward(module_adapter.site.module):
        return False
    parts = [p for t in stacked_on for m in t.module_adapters for p in (*m.on_input, *m.on_output)]
    return all(p.delta.adds_linear_map or p.delta.is_scale_shift for p in parts)


def maps_parameters(term: Term) -> bool:
    """It has own values for parameters of the module itself."""
    return any(m.on_parameters for m in term.module_adapters)


def _maps_output(term: Term) -> bool:
    return any(m.on_output for m in term.module_adapters)
