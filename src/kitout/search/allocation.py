"""Ranks by site under a budget of trainable parameters, from what one pass over data says about each site.

"eva" (Paischer et al. 2024, arXiv 2410.07170) gives ranks one by one to the directions of inputs that explain most of
their site's variance; "gora" (He et al. 2025, arXiv 2502.12171) and "gradient" divide the parameters in proportion to
mean |W * G| and to |G|^2; "uniform" gives all sites the same rank. It knows numbers, and no model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from kitout.errors import ConfigError
from kitout.methods.lora import LoRA
from kitout.signals.site_signals import Signals, SiteSignals

Criterion = Literal["eva", "gora", "gradient", "uniform"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
NUM_HALVINGS = 100  # of the interval in which the logarithm of a multiplier lies
LARGEST_EXPONENT = 300.0


def allocate(
    signals: Signals,
    max_trainable_parameters: int,
    by: Criterion = "eva",
    min_rank: int = 1,
    max_rank_ratio: float = 2.0,
    **settings: Any,
) -> LoRA:
    """LoRA(rank={path: r}) with as many parameters as the budget holds: no further rank of any site fits.

    min_rank: of every site; where the budget is too small for that, the least important sites are left out, and with 0
    a site may get none. max_rank_ratio: the highest rank, as a multiple of the rank that all sites would have; it is
    exceeded only where the budget could not be spent otherwise. settings: others of LoRA, such as init="eva", with
    which no rank is above what the signals can start.
    """
    limits = {path: _highest_start(site, settings.get("init")) for path, site in signals.items()}
    ranks = allocate_ranks(signals, max_trainable_parameters, by, min_rank, max_rank_ratio, limits)
    return build_lora(signals, ranks, settings)


def allocate_ranks(
    signals: Signals, max_trainable_parameters: int, by: Criterion, min_rank: int = 1, max_rank_ratio: float = 2.0,
    limits: Mapping[str, int] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Path -> rank of every site, 0 for those that are left out. limits: by path; None: what each site can hold."""
    sites = list(signals.values())
    highest = [site.max_rank if limits is None else limits[site.path] for site in sites]
    if by not in CRITERIA:
        raise ConfigError(f"allocate: by={by!r} is none of {', '.join(CRITERIA)}")
    if min_rank < 0 or not max_rank_ratio >= 1.0:
        raise ConfigError(
            f"allocate: min_rank is at least 0 and max_rank_ratio at least 1, found {min_rank} and {max_rank_ratio}"
        )
    lowest = [min(min_rank, limit) for limit in highest]
    cheapest = min((site.cost * max(1, rank) for site, rank in zip(sites, lowest, strict=True)), default=0)
    if not sites or max_trainable_parameters < cheapest:
        raise ConfigError(
            f"allocate: {max_trainable_parameters:,} trainable parameters are fewer than rank {max(1, min_rank)} of "
            f"the smallest site takes, {cheapest:,}"
        )
    importance = _importance(sites, by)
    kept = set(_affordable(sites, importance, lowest, max_trainable_parameters))
    uniform = max_trainable_parameters / sum(sites[i].cost for i in kept)
    caps = [0] * len(sites)
    for i in kept:
        caps[i] = min(highest[i], max(lowest[i], math.ceil(max_rank_ratio * uniform)))
    ranks = [lowest[i] if i in kept else 0 for i in range(len(sites))]
    if by == "eva":

        def priority(i: int) -> float:
            return _explained_by(sites[i], ranks[i])

    else:
        total = sum(importance)
        shares = [
            site.cost if by == "uniform" else value / total for site, value in zip(sites, importance, strict=True)
        ]
        wanted = _proportional(sites, shares, ranks, caps, max_trainable_parameters)
        ranks = [math.floor(value + 1e-9) for value in wanted]

        def priority(i: int) -> float:
            return wanted[i] - ranks[i]

    costs, left = [site.cost for site in sites], max_trainable_parameters - _cost(sites, ranks)
    left = _spend(ranks, costs, caps, left, priority)
    _spend(ranks, costs, [limit if i in kept else 0 for i, limit in enumerate(highest)], left, priority)
    return {site.path: rank for site, rank in zip(sites, ranks, strict=True)}


def build_lora(signals: Signals, ranks: dict[str, int], settings: dict[str, Any]) -> LoRA:
    """The method of these ranks: its keys are the paths, and select the sites as well."""
    if refused := sorted({"rank", "targets", "layers", "energy"} & settings.keys()):
        raise ConfigError(f"allocate: {', '.join(refused)} follow from the signals: leave them out")
    words: dict[str, int] = {}
    ambiguous: dict[int, list[str]] = {}  # another module's path ends alike
    for path, rank in ranks.items():
        word = signals[path].word
        if rank and word == path:
            words[word] = rank
        elif rank:
            ambiguous.setdefault(rank, []).append(re.escape(path))
    words |= {f"re:{'|'.join(paths)}": rank for rank, paths in ambiguous.items()}
    if ambiguous:
        settings = {"targets": " ".join(words), **settings}
    return LoRA(rank=words, **settings)


def _highest_start(site: SiteSignals, init: Any) -> int:
    """The highest rank that LoRA's `init` can start here; where nothing was collected for it, `kit.add` says so."""
    if init == "eva" and site.directions is not None:
        return min(site.max_rank, len(site.directions))
    if init == "loraga" and site.gradient is not None and len(site.gradient[1]) < site.max_rank:
        return len(site.gradient[1]) // 2
    return site.max_rank


def _importance(sites: Sequence[SiteSignals], by: Criterion) -> list[float]:
    """What decides which sites are left out, and for all but "eva" what the parameters are divided by."""
    if by == "uniform":
        return [1.0] * len(sites)
    if by == "eva":
        if not all(site.explained_variance for site in sites):
            raise ConfigError(
                "allocate: by='eva' needs the directions of the inputs: signals(kit, batches, directions=32)"
            )
        return [site.explained_variance[0] for site in sites]
    values = [site.gradient_energy if by == "gradient" else site.weight_gradient for site in sites]
    if any(value is None for value in values):
        raise ConfigError("allocate: by='gora' needs mean |W * G|: signals(kit, batches, gora=True)")
    numbers = [float(value) for value in values if value is not None]
    if not all(map(math.isfinite, numbers)) or not sum(numbers) > 0.0:
        raise ConfigError(f"allocate: by={by!r}: the gradients are all 0, or not finite: look at the loss")
    return numbers


def _affordable(
    sites: Sequence[SiteSignals], importance: Sequence[float], lowest: Sequence[int], budget: int
) -> list[int]:
    """The sites that may have a rank: the most important ones whose lowest ranks fit; of equals the later."""
    order = sorted(range(len(sites)), key=lambda i: (-importance[i], -i))
    kept, spent = [], 0
    for i in order:
        cost = lowest[i] * sites[i].cost
        if spent + cost <= budget:
            kept.append(i)
            spent += cost
    return sorted(kept)


def _explained_by(site: SiteSignals, index: int) -> float:
    """The share that a direction explains; what lies behind the known ones is taken to be spread evenly."""
    known = site.explained_variance
    if index < len(known):
        return known[index]
    rest = max(0.0, 1.0 - sum(known)) / max(1, site.max_rank - len(known))
    return min(rest, known[-1])


def _proportional(
    sites: Sequence[SiteSignals], shares: Sequence[float], lowest: Sequence[int], caps: Sequence[int], budget: int
) -> list[float]:
    """Ranks, not yet whole, whose parameters are in proportion to these shares where the limits allow it."""

    def ranks(exponent: float) -> list[float]:
        values = [math.exp(exponent) * share / site.cost for site, share in zip(sites, shares, strict=True)]
        return [min(max(value, least), most) for value, least, most in zip(values, lowest, caps, strict=True)]

    low, high = -LARGEST_EXPONENT, LARGEST_EXPONENT
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        if sum(rank * site.cost for rank, site in zip(ranks(middle), sites, strict=True)) > budget:
            high = middle
        else:
            low = middle
    return ranks(low)


def _cost(sites: Sequence[SiteSignals], ranks: Sequence[int]) -> int:
    return sum(site.cost * rank for site, rank in zip(sites, ranks, strict=True))


def _spend(
    ranks: list[int], costs: Sequence[int], caps: Sequence[int], left: int, priority: Callable[[int], float]
) -> int:
    """Gives ranks one by one, to the highest priority that still fits, the first of equals. Returns what is left."""
    while True:
        fitting = [i for i in range(len(ranks)) if ranks[i] < caps[i] and costs[i] <= left]
        if not fitting:
            return left
        best = max(fitting, key=lambda i: (priority(i), -i))
        ranks[best] += 1
        left -= costs[best]
