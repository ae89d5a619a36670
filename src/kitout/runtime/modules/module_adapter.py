"""One adapter at one module: its Deltas there, applied in the layout each site needs.

Layout, channel subsets, tuple outputs, residual sources and strength are handled here and nowhere else, so that a
Delta sees plain channels-last values. It knows nothing of rows, stacks or routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kitout import fast
from kitout.base.site import Site
from kitout.base.weights import FrozenModule, as_stored, bias, fan_in, to_matrix, weight_matrix
from kitout.delta import Delta
from kitout.errors import RouteError
from kitout.runtime.modules.real_positions import RealPositions


class InputRelay:
    """Where a module's input waits for the site that reads it: written by one hook, read by another, same forward."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Tensor | None = None


class Relay(Protocol):
    """A value that one hook leaves for others; None while there is none. Rows see their own part of it."""

    value: Tensor | None


@dataclass(eq=False)
class SiteDelta:
    """One site's Delta with what it needs around it."""

    site: Site
    """Where it sits."""
    delta: Delta
    """What it does there."""
    relay: InputRelay | None = None
    """Where its input comes from; None: the module's own input."""
    real_positions: RealPositions | None = None
    """Which positions are real, for a Delta that averages over them; None where it is not to average."""
    frozen: FrozenModule | None = field(init=False)
    """The frozen module, for a Delta that reads its weight."""
    read_names: tuple[str, ...] = field(init=False, default=())
    """Port "weight": the parameters of the reader that it changes, weight first."""

    def __post_init__(self) -> None:
        self.frozen = FrozenModule(self.site) if self.delta.reads_weight else None
        self.site.channel_index  # noqa: B018 - cached now: cached_property takes a lock, which a compiled graph cannot
        if self.site.port == "weight":
            weight, b = self.site.read_names
            has_bias = bias(self.site.module, self.site.bias_name) is not None
            self.read_names = (weight, b) if b and (has_bias or makes_bias(self.delta, self.site)) else (weight,)

    @property
    def is_direct(self) -> bool:
        """True where the Delta can be called on the module's own x and y as they are."""
        s = self.site
        return s.port == "out" and s.channel_index is None and not s.channels_first and self.relay is None

    def input(self, x: Tensor) -> Tensor:
        if self.relay is None:
            return x
        if self.relay.value is None:
            raise RuntimeError(f"{self.site.path}: its source {self.site.input_from} did not fire before it")
        return self.relay.value

    def __call__(self, x: Tensor, y: Tensor, may_overwrite: bool, module_x: bool = True) -> Tensor:
        """y at this site, after the Delta. module_x: x is still the module's own input."""
        if module_x:
            x = self.input(x)
        if self.site.role.startswith("sub.") and y.ndim < x.ndim:  # it flattens [rows, tokens] (experts)
            x = x.reshape(*y.shape[:-1], x.shape[-1])
        if self.delta.replaces_module:  # the module's own call, in the module's own layout
            return self._run(x, y, False)
        if self.site.channels_first:
            x = x.movedim(1, -1) if self.site.port == "in" else x  # a convolution's output reads it as it is
            return self._run_on_channels(x, y.movedim(1, -1), False).movedim(-1, 1)
        return self._run_on_channels(x, y, may_overwrite)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The module's whole weight [d_out, d_in] and bias after the Delta, which may change some channels of them."""
        channels = self.site.channels_on(w.device)
        if channels is None:
            return self.delta.fold(w, b)
        new_w, new_b = self.delta.fold(w[channels], None if b is None else b[channels])
        w = w.clone()
        w[channels] = new_w
        if new_b is not None:
            b = w.new_zeros(w.shape[0]) if b is None else b.clone()
            b[channels] = new_b
        return w, b

    def read_values(self) -> dict[str, Tensor]:
        """Port "weight": the reader's frozen parameters by `read_names`; zeros for a bias that it does not have."""
        module = self.site.module
        w, b = weight_matrix(module, self.site.weight_name), bias(module, self.site.bias_name)
        values = (module.get_parameter(self.site.weight_name), w.new_zeros(w.shape[0]) if b is None else b)
        return dict(zip(self.read_names, values, strict=False))

    def map_weight(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Port "weight": the reader's parameters after the Delta, folded in fp32 or better and cast back."""
        weight, *rest = self.read_names
        stored, b = parameters[weight], parameters[rest[0]] if rest else None
        dtype = torch.promote_types(stored.dtype, torch.float32)
        w = to_matrix(self.site.module, stored.to(dtype))
        new_w, new_b = self.fold(w, None if b is None else b.to(dtype))
        new = {weight: as_stored(self.site.module, new_w, stored.shape).to(stored.dtype)}
        return new if b is None or new_b is None else {**new, rest[0]: new_b.to(b.dtype)}

    def combine(self, x: Tensor, y: Tensor, values: Sequence[Tensor], new: Tensor) -> Tensor:
        """`new`, with what the Delta makes of y and of the parts' values in the channels of this site."""
        x = self.input(x)
        if self.site.role.startswith("sub.") and y.ndim < x.ndim:  # it flattens [rows, tokens] (experts)
            x = x.reshape(*y.shape[:-1], x.shape[-1])
        channels = self.site.channels_on(y.device)
        if self.site.channels_first:
            y, *values = (value.movedim(1, -1) for value in (y, *values))
        if self.real_positions is not None:
            assert channels is None
            combined = self.delta.combine(x, y, values, self.real_positions.of(y, self.site.path))
            return combined.movedim(-1, 1) if self.site.channels_first else combined
        if channels is None:
            combined = self.delta.combine(x, y, values)
            return combined.movedim(-1, 1) if self.site.channels_first else combined
        if isinstance(channels, slice):
            combined = self.delta.combine(x, y[..., channels], [value[..., channels] for value in values])
            return torch.cat((new[..., : channels.start], combined, new[..., channels.stop :]), -1)
        own = [value.index_select(-1, channels) for value in (y, *values)]
        return new.index_copy(-1, channels, self.delta.combine(x, own[0], own[1:]))

    def _run_on_channels(self, x: Tensor, y: Tensor, may_overwrite: bool) -> Tensor:
        span = self.site.channels_on(y.device)
        if span is None:
            return self._run(x, y, may_overwrite)
        if isinstance(span, slice):
            new = self._run(x, y[..., span], False)
            return torch.cat((y[..., : span.start], new, y[..., span.stop :]), -1)
        return y.index_copy(-1, span, self._run(x, y.index_select(-1, span), False))

    def _run(self, x: Tensor, y: Tensor, may_overwrite: bool) -> Tensor:
        delta = self.delta
        if may_overwrite and fast.enabled():
            return delta.forward_(x, y, self.frozen)
        return delta(x, y, self.frozen) if delta.reads_weight else delta(x, y)


@dataclass(eq=False)
class ModuleAdapter:
    """What one adapter does at one module."""

    name: str
    """The adapter's."""
    on_input: tuple[SiteDelta, ...]
    """What acts on the module's input."""
    on_output: tuple[SiteDelta, ...]
    """What acts on its output."""
    on_parameters: tuple[SiteDelta, ...] = ()
    """What replaces single parameters of it."""
    on_weights: tuple[SiteDelta, ...] = ()
    """What changes the weights that it multiplies by itself (port "weight")."""
    on_parts: tuple[SiteDelta, ...] = ()
    """What combines its output as other adapters leave it (port "parts")."""
    strength: float = 1.0
    """y + strength * (delta - y), likewise for a parameter."""

    @property
    def site(self) -> Site:
        """One of the sites here: they share a module."""
        return (*self.on_parts, *self.on_output, *self.on_input, *self.on_parameters, *self.on_weights)[0].site

    @property
    def replaces_module(self) -> bool:
        """True where the base's product is not read."""
        return self.strength == 1.0 and any(p.delta.replaces_module for p in self.on_output)

    @property
    def relays(self) -> tuple[Relay, ...]:
        relays: list[Relay] = [p.relay for p in (*self.on_parts, *self.on_output) if p.relay is not None]
        return (*relays, *(p.real_positions for p in self.on_parts if p.real_positions is not None))

    @property
    def call_views(self) -> tuple[FrozenModule, ...]:
        """Views that need the module's call before `map_output`."""
        return tuple(p.frozen for p in self.on_output if p.delta.replaces_module and p.frozen is not None)

    def map_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's own parameters as this adapter changes them."""
        new = dict(parameters)
        for part in self.on_parameters:
            for name, value in (part.delta.parameter_values() or {}).items():
                new[name] = self._blend(new[name], value.to(new[name].dtype))
        return new

    def map_weights(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that the module multiplies by, with this adapter's changes of weights folded in."""
        new = dict(parameters)
        for part in self.on_weights:
            new |= {name: self._blend(new[name], value) for name, value in part.map_weight(new).items()}
        return new

    def map_input(self, x: Tensor) -> Tensor:
        """The module's input as this adapter changes it."""
        if not self.on_input or self.strength == 0.0:
            return x
        new = x
        for part in self.on_input:
            new = part(x, new, may_overwrite=False, module_x=False)
        return self._blend(x, new)

    def map_output(self, x: Tensor, y: Tensor, may_overwrite: bool) -> Tensor:
        """The module's output as this adapter changes it; x is what `map_input` gave."""
        if not self.on_output or self.strength == 0.0:
            return y
        may_overwrite = may_overwrite and self.strength == 1.0
        new = y
        for part in self.on_output:
            new = part(x, new, may_overwrite or new is not y)
        return self._blend(y, new)

    def combine(self, x: Tensor, y: Tensor, values: Sequence[Tensor]) -> Tensor:
        """The module's output of what each part of a composition makes of it; x is the module's own input."""
        if self.strength == 0.0:
            return y
        new = y
        for part in self.on_parts:
            new = part.combine(x, y, values, new)
        return self._blend(y, new)

    def _blend(self, old: Tensor, new: Tensor) -> Tensor:
        return new if self.strength == 1.0 else old + self.strength * (check_blendable(new, old) - old)


def makes_bias(delta: Delta, site: Site) -> bool:
    """The Delta gives a bias to a linear that has none."""
    width = 1 if delta.is_scale_shift else fan_in(site)
    with torch.no_grad():
        return delta.fold(next(delta.parameters()).new_ones(site.d_out, width), None)[1] is not None


def check_blendable(new: Tensor, old: Tensor) -> Tensor:
    """new, or RouteError where broadcasting would have made a blend of two unlike values.

    The first dimension may differ: a position table answers once for all rows.
    """
    if new.shape[1:] != old.shape[1:]:
        raise RouteError(
            f"a value of shape {list(new.shape)} cannot be blended with the base's {list(old.shape)}: a head of "
            "another width is active at strength 1 and outside of Mix only"
        )
    return new
