"""A fused adapter as LoRA: each change of a matrix cut to a rank, by its factors where it has them.

What LoRA has no place for is left out, where the caller allows it, and counts in the residual. It knows sites, factors
and LoRA's settings, and nothing of where changes come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kitout.base.site import Site
from kitout.base.weights import fan_in
from kitout.errors import ConfigError
from kitout.fuse.changes import Change, Place, ProductChange, as_dense, bias_name, square_of, weight_name
from kitout.fuse.lora.targets import selected, with_ranks, words_for
from kitout.fuse.residual import FusedAdapter
from kitout.fuse.result import ROUNDING, Combined, NewAdapter
from kitout.fuse.truncate import Truncated, truncate_matrix, truncate_product
from kitout.method import Method
from kitout.methods.lora import BIAS, LoRA


def as_written(to: Method) -> str:
    """The config as it was written, for messages."""
    return f"{type(to).__name__}({', '.join(f'{k}={v!r}' for k, v in to.model_dump(exclude_unset=True).items())})"


def check_plain(to: LoRA) -> None:
    """ConfigError for a form of LoRA that is no sum."""
    if to.dora or to.init != "default" or to.adaptive:
        raise ConfigError(f"to={as_written(to)}: the result is a plain LoRA, without dora, init and adaptive")
    if to.targets is None and to.layers != "all":
        raise ConfigError(f"to: layers={to.layers!r} belongs to targets=; without both it sits where something changes")
    if any(word.startswith("in:") for word in (to.targets or "").split()):
        raise ConfigError(f"to: targets={to.targets!r}: the result acts on outputs; leave out 'in:'")


class LoRABuilder:
    """Takes changes place by place and makes the adapter of them."""

    def __init__(self, new: NewAdapter, to: LoRA) -> None:
        check_plain(to)
        self.new, self.to = new, to
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.sites: dict[str, Site] = {}
        self.shifts: dict[str, tuple[Place, Tensor, float]] = {}
        self.chosen: dict[str, list[Site]] | None = None
        if to.targets is not None:
            self.chosen = {}
            probe = to.model_copy(update={"energy": None, "rank": 1})
            for site in selected(new.state, probe, new.heads):
                self.chosen.setdefault(weight_name(site), []).append(site)

    def take(self, place: Place, combined: Combined) -> None:
        change = combined.change
        if place.kind in ("biases", "norms") and (self.to.lora_bias or self.to.bias != "none"):
            assert isinstance(change, Tensor)
            self.shifts[place.name] = place, change, combined.square  # there is a place for it or not: seen at the end
            return
        sites = self._sites_at(place)
        if not sites:
            self.new.leave_out(place, combined.square / place.scale**2)
            return
        if self.new.refused:
            return  # it will not be made: no need to decompose matrices
        for site in sites:
            self._cut(place, site, _rows(change, site), combined.parts)
        if sites[0].channels is not None:
            rest = _other_rows(change, sites)
            self.new.leave_out(place, rest / place.scale**2 if rest > ROUNDING * combined.parts else 0.0)

    def _sites_at(self, place: Place) -> list[Site]:
        if self.chosen is not None:
            return [s for s in self.chosen.get(place.name, []) if s.parameter_names != BIAS]
        return [] if place.site is None else [place.site]

    def _cut(self, place: Place, site: Site, change: Change, parts: float) -> None:
        rank = None if self.to.energy is not None else self.to.rank_at(site)
        if isinstance(change, ProductChange):
            cut = truncate_product(change.a, change.b, rank, self.to.energy, ROUNDING * parts)
        elif square_of(change) <= ROUNDING * parts:
            cut = Truncated(change.new_zeros(1, change.shape[1]), change.new_zeros(change.shape[0], 1), 0.0, 0.0)
        else:
            cut = truncate_matrix(change, rank, self.to.energy)
        self.factors[site.key], self.sites[site.key] = (cut.a, cut.b), site
        self.new.residual.add(place.path, place.role, cut.total / place.scale**2, cut.lost / place.scale**2)

    def finish(self) -> FusedAdapter:
        new, to = self.new, self.to
        if self.sites and not new.refused:
            method, sites = self._method()
        else:
            method, sites = to, []
        held = {bias_name(site) for site in sites if _has_shift(method, site)}
        for name, (place, _, square) in self.shifts.items():
            if name not in held:
                new.leave_out(place, square)
            elif square:
                new.residual.add(place.path, place.role, square, 0.0)
        can_shift = all(kind == "biases" for kind in new.refused.values()) and not to.lora_bias
        hint = "lora_bias=True of the LoRA holds biases of its targets, or to='dense' holds all"
        new.check_refused("a LoRA", hint if can_shift else "to='dense' holds all of it")
        if not sites:
            raise ConfigError(f"{new.name!r} would change no matrix: there is nothing for a LoRA to hold")
        shifts = {name: value for name, (_, value, _) in self.shifts.items() if name in held}
        values = lora_values(method, sites, self.factors, shifts, new.dtype)
        return FusedAdapter(new.register(method, sites, values), new.residual, new.dropped)

    def _method(self) -> tuple[LoRA, list[Site]]:
        """The config that has these sites and ranks, and all of its sites."""
        new, to = self.new, self.to
        if self.chosen is None:
            words = words_for(
                new.state, list(self.sites.values()), [m for source in new.sources for m in source.methods], new.heads
            )
            if words is None:
                raise ConfigError(f"no targets select exactly {', '.join(s.path for s in self.sites.values())[:200]}")
            to = LoRA(**{**to.model_dump(exclude_unset=True), "targets": words[0], "layers": words[1]})
            targets = list(self.sites.values())
        else:
            targets = [s for sites in self.chosen.values() for s in sites if s.parameter_names != BIAS]
        ranks: dict[str, int] = {}
        for site in targets:
            rank = self.factors[site.key][0].shape[0] if site.key in self.factors else 1
            ranks[site.path] = max(ranks.get(site.path, 1), rank if to.energy is not None else to.rank_at(site))
        method = with_ranks(new.state, to, targets, ranks)
        return method, selected(new.state, method, new.heads)


def lora_values(
    method: LoRA,
    sites: list[Site],
    factors: dict[str, tuple[Tensor, Tensor]],
    shifts: dict[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of a LoRA, by the names they have in a file: padded to its rank, and its biases."""
    values: dict[str, Tensor] = {}
    for site in sites:
        if site.parameter_names != BIAS:
            rank, scale = method.rank_at(site), method.scale_at(site)
            a, b = torch.zeros(rank, fan_in(site), dtype=dtype), torch.zeros(site.d_out, rank, dtype=dtype)
            if site.key in factors:
                own_a, own_b = factors[site.key]
                a[: own_a.shape[0]], b[:, : own_b.shape[1]] = own_a.to(dtype), (own_b / scale).to(dtype)
            values |= {f"{site.key}.a": a, f"{site.key}.b": b}
        if _has_shift(method, site):
            shift = shifts.get(bias_name(site))
            index = slice(None) if site.channel_index is None else site.channel_index
            values[f"{site.key}.shift"] = (torch.zeros(site.d_out) if shift is None else shift[index]).to(dtype)
    return values


def _has_shift(method: LoRA, site: Site) -> bool:
    """The adapter has a trained bias there."""
    return site.parameter_names == BIAS or method.trains_bias_at(site)


def _rows(change: Change, site: Site) -> Change:
    if site.channel_index is None:
        return change
    if isinstance(change, ProductChange):
        return ProductChange(change.a, change.b[site.channel_index])
    return change[site.channel_index]


def _other_rows(change: Change, sites: list[Site]) -> float:
    """Square of the norm of the rows that are no site's."""
    matrix = as_dense(change)
    rest = torch.ones(matrix.shape[0], dtype=torch.bool)
    for site in sites:
        rest[site.channel_index] = False
    return square_of(matrix[rest])
