"""A fused adapter as trained copies: FullFineTuning of the modules that a change touches.

It holds any change of parameters that exist, of any rank. It cannot hold a bias where the module has none, or two
values of one tied parameter. It knows parameters by name and nothing of where their changes come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kitout.base.find.parameters import parameter_sites
from kitout.base.site import Site
from kitout.errors import ConfigError, TargetError
from kitout.fuse.changes import Place, as_dense, base_parameters, square_of
from kitout.fuse.lora.targets import selected, words_for
from kitout.fuse.residual import FusedAdapter
from kitout.fuse.result import Combined, NewAdapter
from kitout.methods.full_finetuning import FullFineTuning


class DenseBuilder:
    """Takes changes place by place and makes the adapter of them."""

    def __init__(self, new: NewAdapter) -> None:
        self.new = new
        try:
            self.sites = parameter_sites(new.state.survey)
        except TargetError as error:  # a quantized base
            first = str(error).splitlines()[1:2] or [str(error)]
            raise ConfigError(
                f"{new.name!r} would be dense, and this base takes no trained copies ({first[0].strip(' -')}): write "
                "to=LoRA(rank=...)"
            ) from None
        self.homes = {_full_name(site, name): site for site in self.sites for name in site.parameter_names}
        self.changes: dict[str, tuple[Place, Tensor]] = {}

    def take(self, place: Place, combined: Combined) -> None:
        square = combined.square / place.scale**2
        if place.name not in self.homes:
            self.new.leave_out(place, square)
            return
        stored = place.to_stored(as_dense(combined.change))
        self.changes[place.name] = place, stored if square else torch.zeros_like(stored)

    def finish(self) -> FusedAdapter:
        new = self.new
        new.check_refused("trained copies of the base's parameters", "LoRA(rank=..., lora_bias=True) makes new biases")
        if not self.changes:
            raise ConfigError(f"{new.name!r} would change nothing that the base holds")
        paths = {self.homes[name].path for name in self.changes}
        touched = [site for site in self.sites if site.path in paths]
        words = words_for(new.state, touched, [], new.heads, lambda t, layers: FullFineTuning(targets=t, layers=layers))
        if words is None:
            raise TargetError(f"{new.name!r}: no targets select exactly {', '.join(sorted(paths))[:200]}")
        method = FullFineTuning(targets=words[0], layers=words[1])
        sites = selected(new.state, method, new.heads)
        values = self._values(sites)
        return FusedAdapter(new.register(method, sites, values), new.residual, new.dropped)

    def _values(self, sites: list[Site]) -> dict[str, Tensor]:
        """Copies with their changes, by the names they have in a file; tied ones once."""
        new, parameters = self.new, base_parameters(self.new.state.base)
        values: dict[str, Tensor] = {}
        by_key: dict[str, str] = {}
        for site in sites:
            for name, key in zip(site.parameter_names, site.tied_keys, strict=True):
                full = _full_name(site, name)
                frozen = parameters[full].detach()
                place, change = self.changes.get(full, (new.places[full], None))
                if key in by_key:
                    first = self.changes.get(by_key[key], (None, None))[1]
                    if not _are_same(first, change):
                        raise ConfigError(
                            f"{full} and {by_key[key]} are one tied parameter and would change in two ways, which one "
                            "copy cannot hold; choose to=LoRA(rank=...)"
                        )
                    continue
                by_key[key] = full
                old = frozen.to(new.dtype)
                value = old.clone() if change is None else (old + change.to(old.device)).to(new.dtype)
                values[f"{site.key}.{name.replace('.', '/')}"] = value
                if change is not None:
                    missing = square_of(change.to(old.device) - (value - old))
                    new.residual.add(place.path, place.role, square_of(change), missing)
        return values


def _full_name(site: Site, name: str) -> str:
    return f"{site.path}.{name}" if site.path else name


def _are_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Up to rounding: one of two uses of a table may have passed a scale and its inverse."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and float((a - b).norm()) <= 1e-6 * float(b.norm())
