"""How changes of one tensor become one: the registry behind `how=`.

A rule is linear (it gives each adapter a coefficient, so LoRAs stay in their factors) or elementwise (it works on whole
matrices, one at a time). It knows tensors and numbers, and nothing of adapters, sites or files. Sources: Yadav 2023
(TIES, 2306.01708), Yu 2023 (DARE, 2311.03099), Deep 2024 (DELLA, 2406.11617), Davari 2023 (Breadcrumbs, 2312.06795),
Wan 2024 (SCE, 2408.07990), Jang 2024 (Model Stock, 2403.19522).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kitout.errors import ConfigError, Errors, suggest

MOST_ALIKE = 0.9995  # cosine above which slerp is a straight line
Draw = Callable[[int, torch.Size], Tensor]
"""(number of the adapter, shape) -> uniform values in [0, 1) that depend on nothing else."""


@dataclass(frozen=True)
class RuleOptions:
    """What `combine` was given besides the weights."""

    density: float = 1.0
    """The share of values that stay."""
    gamma: float = 0.01
    """breadcrumbs: the share of the largest values that goes."""
    epsilon: float = 0.15
    """della: how far the probability of staying goes up and down around the density."""


@dataclass(frozen=True)
class Rule:
    """One `how`."""

    name: str
    """As `how=` names it."""
    coefficients: Callable[[Sequence[float], Tensor | None], list[float]] | None = None
    """(weights, inner products of the changes or None) -> one coefficient per adapter. None: it is elementwise."""
    elementwise: Callable[[Sequence[Tensor], Sequence[float], RuleOptions, Draw], Tensor] | None = None
    """(changes as matrices, weights, options, draw) -> one change. None: it is linear."""
    reads_angles: bool = False
    """Its coefficients depend on the inner products."""
    density: float | None = None
    """The default density; None: it has no density."""
    extra: frozenset[str] = field(default_factory=frozenset)
    """Options besides density."""
    own_weights: bool = False
    """It computes its weights itself: those that are given have to be equal."""


def rule_of(how: str) -> Rule:
    if not isinstance(how, str) or how not in RULES:
        known = [*RULES, "parameters"]
        raise ConfigError(f"how={how!r}: {suggest(str(how), known, max_shown=len(known))}")
    return RULES[how]


def check_rule(
    rule: Rule, weights: Sequence[float], density: float | None, gamma: float | None, epsilon: float | None
) -> RuleOptions:
    """The options of this rule with its defaults; ConfigError for those that it does not have, or out of range."""
    errors = Errors(ConfigError, f"how={rule.name!r}")
    given = {"density": density, "gamma": gamma, "epsilon": epsilon}
    allowed = rule.extra | ({"density"} if rule.density is not None else set())
    for option in (name for name, value in given.items() if value is not None and name not in allowed):
        takers = [
            r.name for r in RULES.values() if option in r.extra or (option == "density" and r.density is not None)
        ]
        errors.add(f"it has no {option}; {option} belongs to {', '.join(takers)}")
    options = RuleOptions(
        rule.density or 1.0 if density is None else density,
        RuleOptions.gamma if gamma is None else gamma,
        RuleOptions.epsilon if epsilon is None else epsilon,
    )
    if not 0 < options.density <= 1:
        errors.add(f"density={options.density:g} is a share of the values: above 0, at most 1")
    if not 0 <= options.gamma < 1:
        errors.add(f"gamma={options.gamma:g} is a share of the values: at least 0, below 1")
    low, high = options.density - options.epsilon, options.density + options.epsilon
    if rule.name == "della" and not (options.epsilon >= 0 and low > 0 and high < 1):
        errors.add(f"density +- epsilon are probabilities above 0 and below 1, found {low:g} and {high:g}")
    if rule.name == "mean" and abs(sum(weights)) < 1e-8:
        errors.add(f"a mean divides by the sum of the weights, and {list(weights)} add up to 0; how='sum' does not")
    if rule.name == "slerp":
        if len(weights) != 2:
            errors.add(f"it goes from one adapter to another, found {len(weights)}")
        elif min(weights) < 0 or sum(weights) <= 0:
            errors.add(
                f"its weights are the way from one to the other, at least 0 and not both 0, found {list(weights)}"
            )
    if rule.own_weights and (max(weights) - min(weights) > 1e-12 or min(weights) <= 0):
        errors.add(f"it computes the weights itself, so give all the same, such as 1.0; found {list(weights)}")
    if rule.name == "sce" and options.density < 1 and len(weights) < 2:
        errors.add("it selects by the variance over several adapters, found one")
    errors.raise_if_any()
    return options


# ---- linear: coefficients ------------------------------------------------------------------------------------------


def _sum(weights: Sequence[float], _gram: Tensor | None) -> list[float]:
    return list(weights)


def _mean(weights: Sequence[float], _gram: Tensor | None) -> list[float]:
    return [w / sum(weights) for w in weights]


def _slerp(weights: Sequence[float], gram: Tensor | None) -> list[float]:
    """Along the arc between two changes; a straight line where they (nearly) point one way, or one is zero."""
    assert gram is not None
    t = weights[1] / sum(weights)
    norms = gram.diagonal().clamp_min(0).sqrt().tolist()
    if min(norms) == 0:
        return [1 - t, t]
    cosine = max(-1.0, min(1.0, float(gram[0, 1]) / (norms[0] * norms[1])))
    if abs(cosine) > MOST_ALIKE:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _stock(weights: Sequence[float], gram: Tensor | None) -> list[float]:
    """t times the mean, t from the mean angle; over the adapters that change this tensor at all."""
    assert gram is not None
    norms = gram.diagonal().clamp_min(0).sqrt().tolist()
    present = [i for i, norm in enumerate(norms) if norm > 0]
    n = len(present)
    cosines = [float(gram[i, j]) / (norms[i] * norms[j]) for i in present for j in present if i < j]
    c = max(0.0, sum(cosines) / len(cosines)) if cosines else 1.0  # changes that point apart cancel: t = 0
    t = n * c / (1 + (n - 1) * c) if n else 0.0
    return [t / n if i in present else 0.0 for i in range(len(weights))]


# ---- elementwise ---------------------------------------------------------------------------------------------------


def number_kept(share: float, n: int) -> int:
    """floor(share * n), where a product such as 0.29 * 100 may come out a hair too small."""
    return math.floor(share * n + 1e-9 * n)


def largest(values: Tensor, k: int) -> Tensor:
    """A mask of exactly k values, the largest; among equal ones the first."""
    flat = values.flatten()
    if k >= flat.numel():
        return torch.ones_like(values, dtype=torch.bool)
    if k <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    mask = flat > threshold
    equal = (flat == threshold).nonzero().flatten()[: k - int(mask.sum())]
    mask[equal] = True
    return mask.view_as(values)


def elect(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES 2 and 3: the sign of the weighted sum, then the weighted mean of those that have it; 0 where none has."""
    sign = torch.where(_weighted_sum(changes, weights) >= 0, 1.0, -1.0).to(changes[0].dtype)
    top, bottom = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        same = (change * weight).sign() == sign
        top += weight * change * same
        bottom += abs(weight) * same
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-30), torch.zeros_like(top))


def _weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total += weight * change
    return total


def _trim(changes: Sequence[Tensor], density: float) -> list[Tensor]:
    return [change * largest(change.abs(), number_kept(density, change.numel())) for change in changes]


def _magnitude(changes: Sequence[Tensor], weights: Sequence[float], options: RuleOptions, _draw: Draw) -> Tensor:
    return _weighted_sum(_trim(changes, options.density), weights)


def _ties(changes: Sequence[Tensor], weights: Sequence[float], options: RuleOptions, _draw: Draw) -> Tensor:
    return elect(_trim(changes, options.density), weights)


def _dropped(changes: Sequence[Tensor], density: float, draw: Draw) -> list[Tensor]:
    """Each value stays with the probability `density` and is then divided by it."""
    return [c * (draw(i, c.shape).to(c.device) < density) / density for i, c in enumerate(changes)]


def _dare(changes: Sequence[Tensor], weights: Sequence[float], options: RuleOptions, draw: Draw) -> Tensor:
    return _weighted_sum(_dropped(changes, options.density, draw), weights)


def _dare_ties(changes: Sequence[Tensor], weights: Sequence[float], options: RuleOptions, draw: Draw) -> Tensor:
    return elect(_dropped(changes, options.density, draw), weights)


def _della(changes: Sequence[Tensor], weights: Sequence[float], options: RuleOptions, draw: Draw) -> Tensor:
    """Drop by rank of the magnitude in the row, divide by the probability, elect and fuse as TIES does."""
    dropped = []
    for i, change in enumerate(changes):
        columns = change.shape[-1]
        rank = change.abs().argsort(stable=True, dim=-1).argsort(dim=-1).to(change.dtype)  # 0 for the smallest
        spread = 2 * rank / (columns - 1) - 1 if columns > 1 else torch.zeros_like(change)
        p = options.density + options.epsilon * spread
        dropped.append(change * (draw(i, change.shape).to(change.device) < p) / p)
    return elect(dropped, weights)


def _breadcrumbs(changes: Sequence[Tensor], weights: Sequence[float], options: RuleOptions, _draw: Draw) -> Tensor:
    """Without the largest, which are outliers, and without the smallest, until the share stays."""
    kept = []
    for change in changes:
        n = change.numel()
        k, top = number_kept(options.density, n), number_kept(options.gamma, n)
        top = min(top, n - k)
        kept.append(change * (largest(change.abs(), k + top) & ~largest(change.abs(), top)))
    return _weighted_sum(kept, weights)


def _sce(changes: Sequence[Tensor], _weights: Sequence[float], options: RuleOptions, _draw: Draw) -> Tensor:
    """Select by variance over the adapters, calculate weights from the energies, erase the minority of signs."""
    mean = _weighted_sum(changes, [1 / len(changes)] * len(changes))
    variance = torch.zeros_like(mean)
    for change in changes:
        variance += (change - mean).square()
    mask = largest(variance, number_kept(options.density, mean.numel()))
    selected = [change * mask for change in changes]
    energies = [float(change.double().square().mean()) for change in selected]
    total = sum(energies)
    if not total:
        return torch.zeros_like(mean)
    sign = torch.where(_weighted_sum(selected, [1.0] * len(selected)) >= 0, 1.0, -1.0).to(mean.dtype)
    agreeing = [torch.where(change.sign() == sign, change, torch.zeros_like(change)) for change in selected]
    shares = [energy / total for energy in energies]
    bottom = _weighted_sum([(change != 0).to(mean.dtype) for change in agreeing], shares)
    top = _weighted_sum(agreeing, shares)
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-30), torch.zeros_like(top))


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("sum", _sum),
        Rule("mean", _mean),
        Rule("ties", elementwise=_ties, density=0.2),
        Rule("dare", elementwise=_dare, density=0.5),
        Rule("dare-ties", elementwise=_dare_ties, density=0.5),
        Rule("magnitude", elementwise=_magnitude, density=0.2),
        Rule("breadcrumbs", elementwise=_breadcrumbs, density=0.9, extra=frozenset({"gamma"})),
        Rule("della", elementwise=_della, density=0.5, extra=frozenset({"epsilon"})),
        Rule("sce", elementwise=_sce, density=1.0, own_weights=True),
        Rule("slerp", _slerp, reads_angles=True),
        Rule("stock", _stock, reads_angles=True, own_weights=True),
    )
}
"""`how` -> its rule. A new one is a function and a line here."""
