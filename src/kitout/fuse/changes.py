"""What adapters change of the base, tensor by tensor: as products where they are low rank, dense where they fold.

A place is one parameter of the base (or a bias that it lacks). Changes of matrices are in the form [d_out, d_in], times
the scale that a table may have; others as they are stored. One module is read at a time, in fp32 or better. It knows
`Delta.low_rank_change`, `Delta.fold` and sites, no method and no rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kitout.base.select import COMPOSITE_ROLES
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.base.weights import as_stored, is_plain_float, linear_scale, parameter_at, to_matrix, weight_matrix
from kitout.errors import NotMergeable
from kitout.runtime.adapter import Adapter
from kitout.runtime.merge.fold import MATRICES, ModuleFolder
from kitout.runtime.merge.pairs import working_dtype
from kitout.runtime.modules.module_adapter import ModuleAdapter, SiteDelta
from kitout.runtime.state import KitState


@dataclass
class ProductChange:
    """A change b a of a matrix."""

    a: Tensor
    """[r, d_in]."""
    b: Tensor
    """[d_out, r]."""

    @property
    def dense(self) -> Tensor:
        return self.b @ self.a


Change = ProductChange | Tensor


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


@torch.no_grad()
def read_changes(
    state: KitState, places: Places, adapters: Sequence[Adapter]
) -> Iterator[tuple[Place, list[Change | None]]]:
    """Every place that any of the adapters changes, with the change of each (None: it does not). Heads are left out."""
    folders = [ModuleFolder([adapter], adapter.name) for adapter in adapters]
    by_path = dict.fromkeys(path for folder in folders for path in folder.paths)
    # What changes parameters of other modules comes first, and is kept until those modules had their turn.
    from_outside = [p for p in by_path if any(_acts_on_parameters_alone(a.by_module.get(p)) for a in adapters)]
    kept: dict[str, list[Change | None]] = {}
    for path in [*from_outside, *(p for p in by_path if p not in from_outside)]:
        here: dict[str, list[Change | None]] = {}
        for i, (adapter, folder) in enumerate(zip(adapters, folders, strict=True)):
            if path not in adapter.by_module:
                continue
            changes = product_changes(adapter.by_module[path], places)
            if changes is None:
                changes = _folded(state, folder, path, places)
            for name, change in changes.items():
                here.setdefault(name, [None] * len(adapters))[i] = change
        if path in from_outside:
            for name, by_adapter in here.items():
                _overlay(kept.setdefault(name, [None] * len(adapters)), by_adapter)
            continue
        for name, by_adapter in here.items():
            merged = kept.pop(name, [None] * len(adapters))
            _overlay(merged, by_adapter)
            yield places[name], merged
    for name in list(kept):
        yield places[name], kept.pop(name)


def _overlay(into: list[Change | None], later: Sequence[Change | None]) -> None:
    for i, change in enumerate(later):
        if change is not None:
            into[i] = change


def _acts_on_parameters_alone(module_adapter: ModuleAdapter | None) -> bool:
    return module_adapter is not None and not (module_adapter.on_input or module_adapter.on_output)


def _folded(state: KitState, folder: ModuleFolder, path: str, places: Places) -> dict[str, Change]:
    """The differences of the module's folded parameters from the frozen ones."""
    try:
        new = folder.fold(path)
    except NotMergeable as reason:
        raise NotMergeable(f"{path} ({', '.join(folder.module_adapters(path))}): {reason}") from None
    module, inside = state.base.get_submodule(path), f"{path}." if path else ""
    changes: dict[str, Change] = {}
    for name, value in new.parameters.items():
        old = parameter_at(module, name)
        dtype = working_dtype(value)
        difference = value.to(dtype) if old is None else value.to(dtype) - old.to(dtype)
        changes[inside + name] = places[inside + name].from_stored(difference)
    return changes


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
            _add_product(changes, name, a, strength * whole_rows(part.site, b, places.matrices[name]))
        if change.shift is not None:
            if part.site.kind == "norm":
                return None
            d_out = places.matrices[name].d_out if name in places.matrices else part.site.d_out
            shift = strength * _whole(part.site, _in_working_dtype(change.shift), d_out)
            before = changes.get(bias_name(part.site))
            changes[bias_name(part.site)] = shift if before is None else _as_tensor(before) + shift
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
    _add_product(changes, name, a, up)
    return True


def _add_product(changes: dict[str, Change], name: str, a: Tensor, b: Tensor) -> None:
    before = changes.get(name)
    if isinstance(before, ProductChange):
        a, b = torch.cat((before.a, a)), torch.cat((before.b, b), 1)
    changes[name] = ProductChange(a, b)


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


def _as_tensor(change: Change) -> Tensor:
    return change.dense if isinstance(change, ProductChange) else change


def difference(places: Places, name: str, new: Tensor, old: Tensor) -> Tensor:
    """The change of a place between two checkpoints."""
    dtype = torch.promote_types(working_dtype(new), working_dtype(old))
    return places[name].from_stored(new.detach().to(old.device, dtype) - old.detach().to(dtype))


def base_parameters(base: nn.Module) -> Mapping[str, nn.Parameter]:
    """Every parameter by every name it has, tied ones included."""
    return dict(base.named_parameters(remove_duplicate=False))
