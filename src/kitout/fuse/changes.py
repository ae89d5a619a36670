"""Changes of the base's tensors: products of factors where they are low rank, dense ones elsewhere.

A place is one parameter of the base (or a bias that it lacks). Changes of matrices are in the form [d_out, d_in], times
the scale that a table may have; others as they are stored. It knows `Delta.low_rank_change` and sites, and neither
methods and rules nor how adapters are composed (`sources.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kitout.base.select import COMPOSITE_ROLES
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.base.weights import as_stored, is_plain_float, linear_scale, to_matrix, weight_matrix
from kitout.errors import NotMergeable
from kitout.fuse.truncate import inner_product
from kitout.runtime.merge.fold import MATRICES
from kitout.runtime.merge.pairs import working_dtype
from kitout.runtime.modules.module_adapter import ModuleAdapter, SiteDelta


@dataclass
class ProductChange:
    """A change b a of a matrix."""

    a: Tensor
    """[r, d_in]."""
    b: Tensor
    """[d_out, r]."""


Change = ProductChange | Tensor


def as_dense(change: Change) -> Tensor:
    """The change as one tensor."""
    return change.b @ change.a if isinstance(change, ProductChange) else change


def square_of(change: Change) -> float:
    """Its squared norm; a product is not formed."""
    if isinstance(change, ProductChange):
        return max(0.0, inner_product(change.a, change.b, change.a, change.b))
    return float(change.double().square().sum())


def add_scaled(before: Change | None, change: Change, weight: float) -> Change:
    """before + weight * change, in the factors where both have them. None: nothing yet."""
    if isinstance(change, ProductChange):
        change = ProductChange(change.a, change.b if weight == 1.0 else weight * change.b)
        if before is None:
            return change
        if isinstance(before, ProductChange):
            return ProductChange(torch.cat((before.a, change.a)), torch.cat((before.b, change.b), 1))
        return before + as_dense(change)
    change = change if weight == 1.0 else weight * change
    return change if before is None else as_dense(before) + change


@dataclass(frozen=True)
class Place:
    """One parameter of the base."""

    name: str
    """Its full name."""
    path: str
    """The module that it belongs to, as sites name it."""
    role: str
    """The role of that module."""
    kind: str
    """"matrices", "biases", "norms" or "other" (tokens, positions, gains outside norms, stacked experts)."""
    site: Site | None = None
    """Matrices: the site of the whole module."""
    scale: float = 1.0
    """Matrices: what the module multiplies its weight's product by."""

    def to_stored(self, matrix: Tensor) -> Tensor:
        """A change as the module stores it."""
        if self.site is None:
            return matrix
        shape = self.site.module.get_parameter(self.site.weight_name).shape
        return as_stored(self.site.module, matrix / self.scale, shape).reshape(shape)

    def from_stored(self, value: Tensor) -> Tensor:
        return value if self.site is None else to_matrix(self.site.module, value) * self.scale


@dataclass
class Places:
    """The places of one base, looked up by name."""

    survey: Survey
    """The base's sites."""
    matrices: dict[str, Site] = field(init=False)
    """Name of a weight -> the site of its whole module."""
    known: dict[str, Place] = field(init=False, default_factory=dict)
    """Those looked up so far."""

    def __post_init__(self) -> None:
        self.matrices = {}
        self._leaves: dict[str, Site] = {}
        for site in self.survey.sites:
            if site.role in COMPOSITE_ROLES or site.channels is not None or site.port not in ("out", "weight"):
                continue
            self._leaves.setdefault(site.path, site)
            if site.kind in MATRICES and site.weight_name in site.module._parameters:
                self.matrices.setdefault(weight_name(site), site)

    def __getitem__(self, name: str) -> Place:
        if name not in self.known:
            self.known[name] = self._look_up(name)
        return self.known[name]

    def _look_up(self, name: str) -> Place:
        site = self.matrices.get(name)
        if site is not None:
            is_called = site.port == "out" and is_plain_float(site.module, site.weight_name)
            try:
                scale = linear_scale(site) if is_called else 1.0
            except NotMergeable:  # a table that does more than look up: a parameter, and no matrix of a linear map
                return Place(name, site.path, site.role, "other")
            return Place(name, site.path, site.role, "matrices", site, scale)
        path, _, last = name.rpartition(".")
        leaf = self._leaves.get(path)
        if leaf is not None and leaf.kind == "norm":
            return Place(name, path, leaf.role, "norms")
        return Place(name, path, "other" if leaf is None else leaf.role, "biases" if last.endswith("bias") else "other")


def weight_name(site: Site) -> str:
    """The full name of a site's weight."""
    return f"{site.path}.{site.weight_name}"


def bias_name(site: Site) -> str:
    """The full name of a site's bias, which may not exist."""
    return f"{site.path}.{site.bias_name or 'bias'}"


def product_changes(module_adapter: ModuleAdapter, places: Places) -> dict[str, Change] | None:
    """The changes of a module by one adapter whose Deltas there are all low rank; None where they are not."""
    parts = [*module_adapter.on_output, *module_adapter.on_weights]
    if module_adapter.on_parameters or not (parts or module_adapter.on_input):
        return None
    strength = module_adapter.strength
    changes: dict[str, Change] = {}
    for part in parts:
        change = part.delta.low_rank_change()
        name = weight_name(part.site)
        if change is None or (change.a is not None and places[name].site is None):
            return None
        if change.a is not None and change.b is not None:
            a, b = _in_working_dtype(change.a), _in_working_dtype(change.b)
            product = ProductChange(a, strength * whole_rows(part.site, b, places.matrices[name]))
            changes[name] = add_scaled(changes.get(name), product, 1.0)
        if change.shift is not None:
            if part.site.kind == "norm":
                return None
            d_out = places.matrices[name].d_out if name in places.matrices else part.site.d_out
            shift = strength * _whole(part.site, _in_working_dtype(change.shift), d_out)
            changes[bias_name(part.site)] = add_scaled(changes.get(bias_name(part.site)), shift, 1.0)
    for part in module_adapter.on_input:
        if not _add_input(changes, part, strength, places):
            return None
    return changes


def _add_input(changes: dict[str, Change], part: SiteDelta, strength: float, places: Places) -> bool:
    """(w + b a)(1 + b' a') = w + b a + (w b' + b (a b')) a': after what acts on the output. False where it has no
    such form.
    """
    name, change = weight_name(part.site), part.delta.low_rank_change()
    if change is None or change.a is None or change.b is None or change.shift is not None:
        return False
    whole = places.matrices.get(name)
    if (
        whole is None
        or places[name].site is None
        or whole.kind != "linear"
        or not is_plain_float(whole.module)
        or places[name].scale != 1.0
    ):
        return False
    a, b = _in_working_dtype(change.a), strength * _in_working_dtype(change.b)
    w = weight_matrix(whole.module)
    up = w.to(b.dtype) @ b
    before = changes.get(name)
    if isinstance(before, ProductChange):
        up = up + before.b @ (before.a @ b)
    changes[name] = add_scaled(before, ProductChange(a, up), 1.0)
    return True


def whole_rows(site: Site, b: Tensor, whole: Site) -> Tensor:
    """B [d_out, r] of the whole module, zeros in the rows that are not this site's channels."""
    return _whole(site, b, whole.d_out)


def _whole(site: Site, rows: Tensor, d_out: int) -> Tensor:
    if site.channel_index is None:
        return rows
    full = rows.new_zeros(d_out, *rows.shape[1:])
    full[site.channel_index] = rows
    return full


def _in_working_dtype(t: Tensor) -> Tensor:
    return t.detach().to(working_dtype(t))


def difference(places: Places, name: str, new: Tensor, old: Tensor) -> Tensor:
    """The change of a place between two checkpoints."""
    dtype = torch.promote_types(working_dtype(new), working_dtype(old))
    return places[name].from_stored(new.detach().to(old.device, dtype) - old.detach().to(dtype))


def base_parameters(base: nn.Module) -> Mapping[str, nn.Parameter]:
    """Every parameter by every name it has, tied ones included."""
    return dict(base.named_parameters(remove_duplicate=False))
