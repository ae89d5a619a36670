"""A weighted sum of LoRAs as one LoRA of the summed rank: factors side by side, nothing lost. Nothing is
decomposed, unless the sum is above the full rank of a module, which then is its rank.

Sites keep their channels and ports where all adapters agree on them; where they do not (one acts on a module's input,
another on its output), each change is first brought to the whole module's output. Biases that LoRAs train are summed.
It knows `Delta.low_rank_change` and LoRA's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kitout.base.site import Site
from kitout.fuse.changes import Change, ProductChange, bias_name, square_of, weight_name
from kitout.fuse.lora.build_lora import lora_values
from kitout.fuse.lora.targets import selected, with_ranks, words_for
from kitout.fuse.residual import FusedAdapter
from kitout.fuse.result import NewAdapter
from kitout.fuse.sources import Source
from kitout.fuse.truncate import truncate_product
from kitout.methods.lora import BIAS, LoRA, max_rank
from kitout.runtime.merge.pairs import working_dtype
from kitout.runtime.modules.module_adapter import ModuleAdapter, SiteDelta

Coefficients = Callable[[str], Sequence[float]]
"""Name of a weight or bias -> one coefficient per adapter."""


@dataclass
class FactorSum:
    """The sum so far."""

    sites: dict[str, Site] = field(default_factory=dict)
    """Key -> site."""
    factors: dict[str, list[ProductChange]] = field(default_factory=dict)
    """Key -> the products at that site."""
    shifts: dict[str, Tensor] = field(default_factory=dict)
    """Name of a bias -> its change."""
    shifted: dict[str, Site] = field(default_factory=dict)
    """Key -> a site whose bias is changed."""

    def add(self, site: Site, a: Tensor, b: Tensor) -> None:
        self.sites[site.key] = site
        self.factors.setdefault(site.key, []).append(ProductChange(a, b))

    def add_shift(self, site: Site, shift: Tensor, d_out: int) -> None:
        self.shifted[site.key] = site
        if site.channel_index is not None:
            full = shift.new_zeros(d_out)
            full[site.channel_index] = shift
            shift = full
        before = self.shifts.get(bias_name(site))
        self.shifts[bias_name(site)] = shift if before is None else before + shift


def are_low_rank(sources: Sequence[Source]) -> bool:
    """Each is a sum of products (and biases of theirs): LoRA without DoRA, whatever its scale and start, and
    compositions in which such adapters add up, or cancel.
    """
    has_products = []
    for source in sources:
        paths, has_product = _paths(source), False
        for path in paths:
            addends = source.addends(path)
            if addends is None or any(m.on_parameters for m in addends):
                return False
            changes = [part.delta.low_rank_change() for m in addends for part in _parts(m)]
            if any(change is None for change in changes):
                return False
            has_product = has_product or any(c is not None and c.a is not None for c in changes)
        if paths and not has_product:
            return False
        has_products.append(has_product)
    return any(has_products)


@torch.no_grad()
def exact_sum(new: NewAdapter, coefficients: Coefficients) -> FusedAdapter | None:
    """The sum of the sources as one LoRA; None where no LoRA is that sum."""
    total = FactorSum()
    mixed = _mixed_modules(new.sources)
    for i, source in enumerate(new.sources):
        for path in _paths(source):
            addends = source.addends(path) or {}
            if any(weight_name(part.site) in mixed for m in addends for part in _parts(m)):
                whole = source.products(path, new.places)
                if whole is None or not _add_whole(total, new, whole, i, coefficients):
                    return None
                continue
            for part, factor in ((part, w * m.strength) for m, w in addends.items() if w for part in _parts(m)):
                change = part.delta.low_rank_change()
                assert change is not None
                site = part.site
                if change.a is not None and change.b is not None:
                    weight = factor * coefficients(weight_name(site))[i]
                    dtype = working_dtype(change.a)
                    total.add(site, change.a.to(dtype), weight * change.b.to(dtype))
                if change.shift is not None:
                    weight = factor * coefficients(bias_name(site))[i]
                    whole_site = new.places.matrices.get(weight_name(site), site)
                    total.add_shift(site, weight * change.shift.to(working_dtype(change.shift)), whole_site.d_out)
    return _as_lora(new, total)


def _paths(source: Source) -> list[str]:
    """The modules that it acts at, without those that heads replace."""
    return [path for path in source.folder.paths if path not in source.head_paths]


def _parts(m: ModuleAdapter) -> tuple[SiteDelta, ...]:
    return *m.on_output, *m.on_weights, *m.on_input


def _mixed_modules(sources: Sequence[Source]) -> set[str]:
    """Weights at which changes meet that are not at one and the same site, nor at disjoint channels."""
    by_weight: dict[str, dict[str, Site]] = {}
    for part in (p for s in sources for path in _paths(s) for m in s.addends(path) or () for p in _parts(m)):
        by_weight.setdefault(weight_name(part.site), {})[part.site.key] = part.site
    mixed = set()
    for name, sites in by_weight.items():
        channels = [site.channels for site in sites.values()]
        flat = [c for each in channels if each is not None for c in each]
        if len(sites) > 1 and (None in channels or len(set(flat)) < len(flat)):
            mixed.add(name)
    return mixed


def _add_whole(
    total: FactorSum, new: NewAdapter, changes: dict[str, Change], i: int, coefficients: Coefficients
) -> bool:
    for name, change in changes.items():
        place = new.places[name]
        if isinstance(change, ProductChange) and place.site is not None:
            total.add(place.site, change.a, coefficients(name)[i] * change.b)
        else:
            owner = next((s for s in new.places.matrices.values() if bias_name(s) == name), None)
            if owner is None or isinstance(change, ProductChange):
                return False
            total.add_shift(owner, coefficients(name)[i] * change, owner.d_out)
    return True


def _as_lora(new: NewAdapter, total: FactorSum) -> FusedAdapter | None:
    sites = list(total.sites.values())
    order = {site.key: i for i, site in enumerate(new.state.survey.sites)}
    sites.sort(key=lambda site: order.get(site.key, order.get(site.path.replace(".", "/"), 0)))
    words = words_for(new.state, sites, [m for source in new.sources for m in source.methods], new.heads)
    if words is None:
        return None
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, int] = {}
    for site in sites:
        products = total.factors[site.key]
        a, b = torch.cat([p.a for p in products]), torch.cat([p.b for p in products], 1)
        square = square_of(ProductChange(a, b))
        if a.shape[0] > max_rank(site):
            cut = truncate_product(a, b, max_rank(site), None)
            a, b = cut.a, cut.b
        factors[site.key] = a, b
        ranks[site.path] = max(ranks.get(site.path, 1), a.shape[0])
        new.residual.add(site.path, site.role, square, 0.0)
    beyond_targets = any(key not in factors for key in total.shifted)
    bias: dict[str, Any] = {"lora_bias": True} if total.shifts else {}
    bias |= {"bias": "all"} if beyond_targets else {}
    method = with_ranks(new.state, LoRA(targets=words[0], layers=words[1], **bias), sites, ranks)
    all_sites = selected(new.state, method, new.heads)
    reached = {s.key for s in all_sites if s.parameter_names == BIAS or method.trains_bias_at(s)}
    if not set(total.shifted) <= reached:
        return None
    values = lora_values(method, all_sites, factors, total.shifts, new.dtype)
    return FusedAdapter(new.register(method, all_sites, values), new.residual, new.dropped)
