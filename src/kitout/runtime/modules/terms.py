"""Terms: the map a route makes of one module, built from the adapters there.

A term is a single adapter, a sequence of terms or a weighted sum of them, with the two moments a module has:
`map_input` before it runs and `map_output` after. It knows nothing of methods or where modules sit, nor of how a module
is called: that is in `programs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from kitout.runtime.modules.module_adapter import ModuleAdapter, check_blendable
from kitout.runtime.routing.route import Mix, RouteEntry


class Term(Protocol):
    """A map of one module: `map_input(x) -> (input for the module, memo)`, then `map_output(memo, y) -> y`."""

    @property
    def maps_input(self) -> bool:
        """Whether `map_input` does anything."""
        ...

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters, by name, as they are while it runs."""
        ...

    def map_input(self, x: Tensor) -> tuple[Tensor, Any]: ...
    def map_output(self, memo: Any, y: Tensor, may_overwrite: bool) -> Tensor: ...


class Single:
    """A single adapter."""

    def __init__(self, module_adapter: ModuleAdapter) -> None:
        self.module_adapter, self.maps_input = module_adapter, bool(module_adapter.on_input)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.module_adapter.map_parameters(parameters)

    def map_input(self, x: Tensor) -> tuple[Tensor, Any]:
        new = self.module_adapter.map_input(x)
        return new, new

    def map_output(self, memo: Any, y: Tensor, may_overwrite: bool) -> Tensor:
        return self.module_adapter.map_output(memo, y, may_overwrite)


class TermSequence:
    """Adapters in order: each takes the module as the ones before it have left it (f_i = out_i . f_{i-1} . in_i)."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms, self.maps_input = tuple(terms), any(t.maps_input for t in terms)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for term in self.terms:
            parameters = term.map_parameters(parameters)
        return dict(parameters)

    def map_input(self, x: Tensor) -> tuple[Tensor, Any]:
        memos: list[Any] = []
        for term in reversed(self.terms):
            x, memo = term.map_input(x)
            memos.append(memo)
        return x, memos[::-1]

    def map_output(self, memo: Any, y: Tensor, may_overwrite: bool) -> Tensor:
        for term, term_memo in zip(self.terms, memo, strict=True):
            new = term.map_output(term_memo, y, may_overwrite)
            may_overwrite = may_overwrite or new is not y
            y = new
        return y


class WeightedSum:
    """y + sum_i w_i (term_i(y) - y), at the input and at the output."""

    def __init__(self, terms: Sequence[tuple[Term, float]]) -> None:
        self.terms, self.maps_input = tuple(terms), any(t.maps_input for t, _ in terms)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mapped = [(term.map_parameters(parameters), w) for term, w in self.terms]
        return {n: value + sum(w * (new[n] - value) for new, w in mapped) for n, value in parameters.items()}

    def map_input(self, x: Tensor) -> tuple[Tensor, Any]:
        mapped = [(term.map_input(x), w) for term, w in self.terms]
        new = x
        for (term_x, _), w in mapped:
            new = new if term_x is x else new + w * (term_x - x)
        return new, [memo for (_, memo), _ in mapped]

    def map_output(self, memo: Any, y: Tensor, may_overwrite: bool) -> Tensor:
        new = y
        for (term, w), term_memo in zip(self.terms, memo, strict=True):
            term_y = term.map_output(term_memo, y, False)
            new = new if term_y is y else new + w * (check_blendable(term_y, y) - y)
        return new


def build_term(
    entry: RouteEntry, single: Callable[[str, Sequence[Term]], Term | None], stacked_on: Sequence[Term] = ()
) -> Term | None:
    """An entry's map at one module, or None where it has nothing there.

    single: a name's own term there, on top of the terms before it (stacked_on).
    """
    if entry is None:
        return None
    if isinstance(entry, str):
        return single(entry, stacked_on)
    if isinstance(entry, Mix):
        weighted = [(build_term(part, single, stacked_on), weight) for part, weight in entry.parts]
        present = [(term, weight) for term, weight in weighted if term is not None]
        return WeightedSum(present) if present else None
    terms: list[Term] = []
    for part in entry.parts:
        term = build_term(part, single, [*stacked_on, *terms])
        if term is not None:
            terms.append(term)
    return terms[0] if len(terms) == 1 else TermSequence(terms) if terms else None
