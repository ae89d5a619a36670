"""A composition at one module: what it makes of the module's output and of what each of its parts makes of it.

The module runs once as it is, and once more for each part that changes its input or its own parameters; parts that act
on the output alone share the first run. So a part sees the module, and none of the other parts, as in a Mix. It knows
terms and `Delta.combine`, and nothing of how a composition weighs its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from kitout.delta import Delta, PartWeight
from kitout.errors import NotMergeable
from kitout.runtime.modules.module_adapter import ModuleAdapter, check_blendable
from kitout.runtime.modules.terms import (
    Single,
    Term,
    TermSequence,
    blend_parameters,
    maps_parameters,
    weighted_sum,
)


class ComposedTerm:
    """A composition over its parts; None for a part that has nothing at this module."""

    def __init__(self, own: ModuleAdapter, parts: Sequence[Term | None]) -> None:
        self.own, self.parts = own, tuple(parts)
        self.present = [part for part in parts if part is not None]
        self.module_adapters = (own, *(m for part in self.present for m in part.module_adapters))
        self.acts_on_values = bool(own.on_output) or any(m.on_input or m.on_output for m in self.module_adapters)
        self.has_own_run = [
            part is not None and self.acts_on_values and (part.maps_input or part.num_runs > 1 or maps_parameters(part))
            for part in parts
        ]
        own_runs = [part for part, alone in zip(parts, self.has_own_run, strict=True) if part is not None and alone]
        self.num_runs = 1 + sum(part.num_runs for part in own_runs)
        self.maps_input = any(part.maps_input for part in own_runs)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        if not self.acts_on_values:  # nothing else is here to combine
            return [blend_parameters(parameters, [(t.map_parameters(parameters)[0], w) for t, w in self._weighted()])]
        runs = [dict(parameters)]
        for part, alone in zip(self.parts, self.has_own_run, strict=True):
            if part is not None and alone:
                runs += part.map_parameters(parameters)
        return runs

    def map_weights(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return blend_parameters(parameters, [(t.map_weights(parameters), w) for t, w in self._weighted()])

    def map_input(self, x: Tensor) -> tuple[list[Tensor], Any]:
        inputs, memos = [x], []
        for part, alone in zip(self.parts, self.has_own_run, strict=True):
            mapped, memo = ([x], None) if part is None else part.map_input(x)
            inputs += mapped if alone else []
            memos.append(memo)
        return inputs, (x, memos)

    def map_output(self, memo: Any, ys: Sequence[Tensor], may_overwrite: bool) -> Tensor:
        (x, memos), y, start = memo, ys[0], 1
        values = []
        for part, alone, of_part in zip(self.parts, self.has_own_run, memos, strict=True):
            value = y
            if part is not None and alone:
                value = part.map_output(of_part, ys[start : start + part.num_runs], may_overwrite)
                start += part.num_runs
            elif part is not None:
                value = part.map_output(of_part, [y], False)
            values.append(check_blendable(value, y))
        return self.own.map_output(x, self.own.combine(x, y, values), False)

    def _weighted(self) -> list[tuple[Term, Any]]:
        weights = mixing_weights(self.own)
        return [(part, w) for part, w in zip(self.parts, weights, strict=True) if part is not None]

    def weight_functions(self) -> list[PartWeight] | None:
        """The weight of each part as it is now, strength included, where that is all there is to it; None elsewhere."""
        if len(self.own.on_parts) != 1 or self.own.on_output:
            return None
        delta = self.own.on_parts[0].delta
        if delta.is_watched or delta.mixing_weights() is None:
            return None
        return [partial(_weight_now, self.own.strength, delta, i) for i in range(len(self.parts))]

    def as_weighted_sum(self) -> Term:
        """The same map as a Mix of its parts with fixed weights. NotMergeable where it has none."""
        terms: list[Term] = [weighted_sum(self._weighted())] if self.present else []
        if self.own.on_output:
            terms.append(Single(replace(self.own, on_parts=())))
        return terms[0] if len(terms) == 1 else TermSequence(terms)


def _weight_now(strength: float, delta: Delta, i: int) -> Tensor:
    weights = delta.mixing_weights()
    assert weights is not None
    return weights[i] if strength == 1.0 else strength * weights[i]


def mixing_weights(own: ModuleAdapter) -> Sequence[Any]:
    """The weight of each part at one module, strength included. NotMergeable where weights depend on the input."""
    for part in own.on_parts:
        weights = part.delta.mixing_weights()
        if weights is None:
            raise NotMergeable(
                f"{type(part.delta).__name__} weighs the parts of {own.name!r} anew at every position: no weights give "
                "the same function"
            )
        return (own.strength * weights).unbind()
    raise AssertionError(f"{own.name} combines nothing at {own.site.path}")
