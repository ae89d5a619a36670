"""Arithmetic over adapters: a named, weighted combination of them, as a new adapter of the same kit.

Everything rests on what adapters change of the base: a sum of LoRAs stays in the factors, all else goes through
`Delta.fold`, one tensor at a time in fp32 or better. `rules.py` has the rules; this file chooses the form. It knows no
method but those that a result may have.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kitout.errors import ConfigError, Errors, UnknownAdapter, suggest
from kitout.fuse.average import average_parameters
from kitout.fuse.build_dense import DenseBuilder
from kitout.fuse.changes import Change, Place, Places, ProductChange, add_scaled, as_dense, square_of
from kitout.fuse.exact_sum import are_low_rank, exact_sum
from kitout.fuse.lora.build_lora import LoRABuilder
from kitout.fuse.residual import FusedAdapter, Residual
from kitout.fuse.result import Combined, NewAdapter, heads_of, parse_drop
from kitout.fuse.rules import Draw, Rule, RuleOptions, check_rule, rule_of
from kitout.fuse.sources import Source, read_changes, sources_of
from kitout.fuse.truncate import inner_product
from kitout.kit import Kit
from kitout.methods.lora import LoRA
from kitout.runtime.adapter import Adapter
from kitout.runtime.build_adapter import check_name
from kitout.runtime.state import KitState

To = Literal["exact", "dense"] | LoRA


@torch.no_grad()
def combine(
    kit: Kit,
    name: str,
    weights: Mapping[str, float],
    *,
    how: str = "sum",
    to: To = "exact",
    density: float | None = None,
    lam: float = 1.0,
    gamma: float | None = None,
    epsilon: float | None = None,
    seed: int = 0,
    drop: str | None = None,
) -> FusedAdapter:
    """A new adapter `name` on the kit: a combination of what the named adapters change, across methods.

    how: "sum", "mean", "ties", "dare", "dare-ties", "magnitude", "breadcrumbs", "della", "sce", "slerp" (two), "stock",
    or "parameters" (the mean of the parameters of adapters of one config that do not fold: prefixes, bottlenecks).
    density, gamma, epsilon: of the rules that have them. lam: a factor on the result. seed: of random draws, which
    depend on it, the adapter's name and the parameter alone.
    to: "exact" (LoRAs added up give a LoRA of the summed rank, all else is dense), "dense" (FullFineTuning of the
    touched modules), LoRA(rank=8) or LoRA(energy=0.99). drop: "biases norms other heads", any of them: what the result
    may leave out; it counts in the residual. The adapters stay as they are, at their strengths. A composition counts as
    what it is made of: LoRAs in a Stack, a Mix, an Only or a Mixture stay in their factors.

    Raises UnknownAdapter; AdapterExists or InvalidAdapterName for the name; MergeStateError while adapters are merged;
    ConfigError for options that the rule or the form does not have, heads that would be added up, and changes that the
    form cannot hold; NotMergeable for an adapter, or a part of a composition, that no weights of the base can hold,
    with what to write instead. Then nothing is added to the kit.
    """
    state = kit.state
    if how == "parameters":
        _check_parameters_options(to, density, lam, gamma, epsilon, drop)
        adapters, values = _check_request(state, name, weights)
        return average_parameters(state, name, adapters, values)
    rule = rule_of(how)
    adapters, values = _check_request(state, name, weights)
    if rule.name != "slerp" and any(values):  # what has no weight has no say in signs or means either
        adapters = [a for a, w in zip(adapters, values, strict=True) if w]
        values = [w for w in values if w]
    options = check_rule(rule, values, density, gamma, epsilon)
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not math.isfinite(lam):
        raise ConfigError(f"lam is a factor on the result, a finite number, found {lam!r}")
    if not (to in ("exact", "dense") if isinstance(to, str) else isinstance(to, LoRA)):
        raise ConfigError(f"to={to!r}: write 'exact', 'dense', LoRA(rank=8) or LoRA(energy=0.99)")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed is a whole number, found {seed!r}")
    note = {"how": how, "weights": dict(weights), "lam": lam, "seed": seed}
    note |= {k: v for k, v in (("density", density), ("gamma", gamma), ("epsilon", epsilon)) if v is not None}
    return fuse(state, name, adapters, values, rule, options, lam, seed, to, parse_drop(drop), note)


def fuse(
    state: KitState,
    name: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rule: Rule,
    options: RuleOptions,
    lam: float,
    seed: int,
    to: To,
    drop: frozenset[str],
    note: dict[str, Any],
    check: Callable[[Residual], None] | None = None,
) -> FusedAdapter:
    """What `combine` does once everything it was given has been checked. check: raises where too much is missing."""
    sources = sources_of(state, adapters)
    heads = heads_of(zip(sources, (lam * w for w in weights), strict=True), drop)
    new = NewAdapter(state, Places(state.survey), name, sources, drop, note, heads, check)
    if to == "exact" and rule.coefficients is not None and are_low_rank(sources):
        by_place = _coefficients_by_place(new, rule, weights) if rule.reads_angles else {}
        common = [] if rule.reads_angles else rule.coefficients(weights, None)
        fused = exact_sum(new, lambda place: [lam * c for c in by_place.get(place, common)])
        if fused is not None:
            return fused
        new = NewAdapter(state, new.places, name, sources, drop, note, heads, check)
    builder = LoRABuilder(new, to) if isinstance(to, LoRA) else DenseBuilder(new)
    for place, combined in combined_changes(state, new.places, sources, weights, rule, options, lam, seed):
        builder.take(place, combined)
    return builder.finish()


def combined_changes(
    state: KitState,
    places: Places,
    sources: Sequence[Source],
    weights: Sequence[float],
    rule: Rule,
    options: RuleOptions,
    lam: float,
    seed: int,
) -> Iterator[tuple[Place, Combined]]:
    """Every place that the sources change, with the one change that the rule makes of theirs."""
    for place, changes in read_changes(state, places, sources):
        if rule.coefficients is not None:
            gram = _gram(changes) if rule.reads_angles else None
            yield place, _linear(changes, [lam * c for c in rule.coefficients(weights, gram)])
            continue
        assert rule.elementwise is not None
        like = next(as_dense(change) for change in changes if change is not None)
        shape = like.shape if like.ndim == 2 else (-1, like.shape[-1]) if like.ndim > 2 else (1, -1)
        matrices = [
            torch.zeros_like(like).reshape(shape) if change is None else as_dense(change).reshape(shape)
            for change in changes
        ]
        draw = _draws(seed, [source.name for source in sources], place.name)
        change = lam * rule.elementwise(matrices, weights, options, draw)
        parts = sum(float((w * m).double().square().sum()) for m, w in zip(matrices, weights, strict=True))
        yield place, Combined(change.reshape(like.shape), lam**2 * parts)


def _linear(changes: Sequence[Change | None], coefficients: Sequence[float]) -> Combined:
    """A weighted sum, in the factors where all have them."""
    present = [(change, c) for change, c in zip(changes, coefficients, strict=True) if change is not None]
    total: Change | None = None
    for change, c in present:
        total = add_scaled(total, change, c)
    assert total is not None
    return Combined(total, sum(c**2 * square_of(change) for change, c in present))


def _gram(changes: Sequence[Change | None]) -> Tensor:
    """Inner products of the changes of one tensor; 0 for an adapter that does not change it."""
    gram = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for i, first in enumerate(changes):
        for j, second in enumerate(changes[: i + 1]):
            if first is None or second is None:
                continue
            if isinstance(first, ProductChange) and isinstance(second, ProductChange):
                value = inner_product(first.a, first.b, second.a, second.b)
            else:
                value = float((as_dense(first).double() * as_dense(second).double()).sum())
            gram[i, j] = gram[j, i] = value
    return gram


def _draws(seed: int, names: Sequence[str], place: str) -> Draw:
    """Uniform values of one adapter at one place; the same on every device."""

    def draw(i: int, shape: torch.Size) -> Tensor:
        digest = hashlib.sha256(f"{seed}\0{names[i]}\0{place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(shape, generator=generator)

    return draw


def _coefficients_by_place(new: NewAdapter, rule: Rule, weights: Sequence[float]) -> dict[str, list[float]]:
    assert rule.coefficients is not None
    pairs = read_changes(new.state, new.places, new.sources)
    return {place.name: rule.coefficients(weights, _gram(changes)) for place, changes in pairs}


def _check_request(state: KitState, name: str, weights: Mapping[str, float]) -> tuple[list[Adapter], list[float]]:
    state.check_attached()
    check_name(state, name)
    state.check_unmerged(f"combining into {name!r}")
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"combine takes adapters with their weights, {{'a': 1.0, 'b': -0.5}}, found {weights!r}")
    errors = Errors(UnknownAdapter, "combine")
    for each in weights:
        if each not in state:
            errors.add(f"no adapter is called {each!r}: {suggest(str(each), state.names)}")
    errors.raise_if_any()
    numbers = {k: w for k, w in weights.items() if isinstance(w, (int, float)) and not isinstance(w, bool)}
    if invalid := {k: w for k, w in weights.items() if k not in numbers or not math.isfinite(w)}:
        raise ConfigError(f"weights are finite numbers, found {invalid}")
    return [state[each] for each in weights], [float(w) for w in weights.values()]


def _check_parameters_options(to: To, *others: object) -> None:
    density, lam, gamma, epsilon, drop = others
    given = {"to": to != "exact", "density": density is not None, "lam": lam != 1.0, "gamma": gamma is not None}
    given |= {"epsilon": epsilon is not None, "drop": drop is not None}
    if unknown := [option for option, is_given in given.items() if is_given]:
        raise ConfigError(f"how='parameters' averages parameters as they are: it has no {', '.join(unknown)}")
