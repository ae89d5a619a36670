"""One adapter at one module: its Deltas there, applied in the layout each site asks for.

Layout, channel subsets, tuple outputs, residual sources and strength are handled here and nowhere else, so that a
Delta sees plain channels-last values. It knows nothing of rows, stacks or routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kitout.base.site import Site
from kitout.base.weights import Frozen
from kitout.delta import Delta
from kitout.errors import RouteError


class Source:
    """Where a module's input waits for the site that reads it: written by one tap, taken by another, same forward."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Tensor | None = None


@dataclass(eq=False)
class Part:
    """One site's Delta with what it needs around it."""

    site: Site
    delta: Delta
    source: Source | None = None
    frozen: Frozen | None = field(init=False)

    def __post_init__(self) -> None:
        self.frozen = Frozen(self.site) if self.delta.reads_weight else None
        self.site.span  # noqa: B018 - found now: cached_property takes a lock, which a compiled graph cannot

    @property
    def simple(self) -> bool:
        """True where the Delta can be called on the module's own x and y as they are."""
        s = self.site
        return s.port == "out" and s.span is None and not s.channels_first and self.source is None

    def input(self, x: Tensor) -> Tensor:
        if self.source is None:
            return x
        if self.source.value is None:
            raise RuntimeError(f"{self.site.path}: its source {self.site.source} did not fire before it")
        return self.source.value

    def __call__(self, x: Tensor, y: Tensor, own: bool, module_x: bool = True) -> Tensor:
        """y at this site, after the Delta. own: y may be overwritten. module_x: x is still the module's own input."""
        if module_x:
            x = self.input(x)
        if self.delta.replaces:  # the module's own call, in the module's own layout
            return self._run(x, y, False)
        if self.site.channels_first:
            return self._spanned(x, y.movedim(1, -1), False).movedim(-1, 1)
        return self._spanned(x, y, own)

    def _spanned(self, x: Tensor, y: Tensor, own: bool) -> Tensor:
        span = self.site.span
        if span is None:
            return self._run(x, y, own)
        if isinstance(span, slice):
            new = self._run(x, y[..., span], False)
            return torch.cat((y[..., : span.start], new, y[..., span.stop :]), -1)
        index = span.to(y.device)
        return y.index_copy(-1, index, self._run(x, y.index_select(-1, index), False))

    def _run(self, x: Tensor, y: Tensor, own: bool) -> Tensor:
        delta = self.delta
        if own:
            return delta.update(x, y, self.frozen)
        return delta(x, y, self.frozen) if delta.reads_weight else delta(x, y)


@dataclass(eq=False)
class Local:
    """One adapter's parts at one module: `ins` act on its input, `outs` on its output, `params` on bare parameters.

    strength: y + s (delta - y), likewise for a parameter.
    """

    name: str
    ins: tuple[Part, ...]
    outs: tuple[Part, ...]
    params: tuple[Part, ...] = ()
    strength: float = 1.0

    @property
    def site(self) -> Site:
        """One of the sites here: they share a module."""
        return (*self.outs, *self.ins, *self.params)[0].site

    @property
    def replaces(self) -> bool:
        """True where the base's product is not read."""
        return self.strength == 1.0 and any(p.delta.replaces for p in self.outs)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(p.source for p in self.outs if p.source is not None)

    @property
    def calls(self) -> tuple[Frozen, ...]:
        """Views that want to know the module's call before `leave`."""
        return tuple(p.frozen for p in self.outs if p.delta.replaces and p.frozen is not None)

    def swap(self, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters as this adapter changes them."""
        new = dict(now)
        for part in self.params:
            for name, value in (part.delta.values() or {}).items():
                new[name] = self._mixed(new[name], value.to(new[name].dtype))
        return new

    def enter(self, x: Tensor) -> Tensor:
        """The module's input as this adapter changes it."""
        if not self.ins or self.strength == 0.0:
            return x
        new = x
        for part in self.ins:
            new = part(x, new, own=False, module_x=False)
        return self._mixed(x, new)

    def leave(self, x: Tensor, y: Tensor, own: bool) -> Tensor:
        """The module's output as this adapter changes it; x is the input as `enter` left it."""
        if not self.outs or self.strength == 0.0:
            return y
        own = own and self.strength == 1.0
        new = y
        for part in self.outs:
            new = part(x, new, own or new is not y)
        return self._mixed(y, new)

    def _mixed(self, old: Tensor, new: Tensor) -> Tensor:
        return new if self.strength == 1.0 else old + self.strength * (same_shape(new, old) - old)


def same_shape(new: Tensor, old: Tensor) -> Tensor:
    """new, or RouteError where broadcasting would have made a blend of two unlike values.

    The first dimension may differ: a position table answers once for all rows.
    """
    if new.shape[1:] != old.shape[1:]:
        raise RouteError(
            f"a value of shape {list(new.shape)} cannot be blended with the base's {list(old.shape)}: a head of "
            "another width is worn whole, at strength 1 and outside of Mix"
        )
    return new
