"""An adapter as named tensors, and built again from them without computing initial values.

An adapter is built on the meta device, over copies of the sites' modules that have shapes and no values. No random
numbers are drawn, no weight is decomposed, and nothing is added to the kit until every tensor is set. All file formats
share it; it knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.errors import Errors
from kitout.files import float_steps
from kitout.files.base_fingerprint import parameters_before_merge
from kitout.files.head_spec import blank_copy
from kitout.method import Method
from kitout.runtime.adapter import Adapter
from kitout.runtime.build_adapter import check_strength, head_site
from kitout.runtime.state import KitState

SHARED, HEAD = "@shared", "@head/"  # first parts of tensor names; those of a Delta start with its site's key

_meta_copies: WeakKeyDictionary[KitState, dict[str, nn.Module]] = WeakKeyDictionary()


@dataclass
class TensorSlot:
    """One tensor of an adapter and where it is held."""

    tensor: Tensor
    base: Tensor | None = None
    """The frozen tensor it started from, where the adapter holds a trained copy of it."""
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """Every dict and name it is held under; tied tensors have several."""

    def set(self, value: Tensor) -> None:
        new = nn.Parameter(value, self.tensor.requires_grad) if isinstance(self.tensor, nn.Parameter) else value
        for owner, name in self.places:
            owner[name] = new


def tensor_slots(adapter: Adapter) -> dict[str, TensorSlot]:
    """Every parameter and persistent buffer of an adapter, each once, under the name it has in a file."""
    slots: dict[str, TensorSlot] = {}
    by_id: dict[int, TensorSlot] = {}
    parts: list[tuple[str, nn.Module, Mapping[str, Tensor]]] = []
    if adapter.shared is not None:
        parts.append((SHARED, adapter.shared, {}))
    for site in adapter.sites:
        delta = adapter.delta(site)
        parts.append((site.key, delta, delta.base_tensors(site.module)))
    for path, head in adapter.heads.items():
        assert isinstance(head.module, nn.Module)
        parts.append((HEAD + path, head.module, {}))
    for prefix, top, bases in parts:
        for path, module in top.named_modules():
            for owner in (module._parameters, module._buffers):
                for name, tensor in owner.items():
                    if tensor is None or name in module._non_persistent_buffers_set:
                        continue
                    key = f"{path}.{name}" if path else name
                    if id(tensor) not in by_id:
                        by_id[id(tensor)] = slots[f"{prefix}.{key}"] = TensorSlot(tensor, bases.get(key))
                    by_id[id(tensor)].places.append((owner, name))
    return slots


def stored_tensors(state: KitState, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors as kitout's own file has them: trained copies as their steps from the base."""
    unmerged = parameters_before_merge(state)
    tensors: dict[str, Tensor] = {}
    for key, slot in tensor_slots(adapter).items():
        frozen = None if slot.base is None else unmerged.get(id(slot.base), slot.base)
        tensors[key] = slot.tensor if frozen is None else float_steps.to_steps(slot.tensor, frozen)
    return tensors


def build_empty(
    state: KitState, name: str, method: Method, sites: Sequence[Site], heads: Mapping[str, nn.Module]
) -> tuple[Adapter, dict[str, TensorSlot]]:
    """The adapter with shapes and no values, and its slots."""
    with torch.device("meta"), torch.no_grad():
        meta_sites = [site.replace(module=_meta_copy_of(state, site)) for site in sites]
        shared = method.build_shared(meta_sites)
        deltas = {site.key: method.build(site, shared) for site in meta_sites}
    adapter = Adapter(name, method, sites, deltas, shared, heads)
    return adapter, tensor_slots(adapter)


def _meta_copy_of(state: KitState, site: Site) -> nn.Module:
    """The site's module without values, built once per kit, so that loading many adapters does not repeat it."""
    copies = _meta_copies.setdefault(state, {})
    if site.path not in copies:
        copies[site.path] = blank_copy(site.module)
    return copies[site.path]


def device_of(state: KitState, adapter: Adapter) -> dict[str, torch.device]:
    """First part of a tensor's name -> the device of the module that it acts on."""
    devices = {SHARED: state.device} | {HEAD + path: state.device for path in adapter.heads}
    return devices | {site.key: state.device_at(site) for site in adapter.sites}


def check_tensors(
    slots: Mapping[str, TensorSlot], stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], errors: Errors
) -> None:
    """Adds an error for tensors that are missing, unexpected, of another shape or of another kind of dtype."""
    for verb, names in (
        ("is missing", [n for n in slots if n not in stored]),
        ("does not belong to this adapter", [n for n in stored if n not in slots]),
    ):
        if names:
            shown = ", ".join(repr(n[:100]) for n in names[:4]) + (
                f" and {len(names) - 4} more" if len(names) > 4 else ""
            )
            errors.add(f"tensor {shown} {verb}")
    for name, slot in slots.items():
        if name not in stored:
            continue
        dtype, shape = stored[name]
        if shape != tuple(slot.tensor.shape):
            errors.add(f"tensor {name!r} has shape {list(shape)}, here it must be {list(slot.tensor.shape)}")
        same_kind = dtype.is_floating_point if slot.tensor.is_floating_point() else dtype == slot.tensor.dtype
        if not same_kind:
            errors.add(f"tensor {name!r} has dtype {dtype}, here it must be {slot.tensor.dtype}")


def non_finite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity."""
    return [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]


def fill_and_register(
    state: KitState, adapter: Adapter, slots: Mapping[str, TensorSlot], values: Mapping[str, Tensor], strength: float
) -> None:
    """Fills the adapter's slots and adds it to the kit, as trainable as a new one and not active.

    RouteError, with the kit as it was, where `use` could not activate it.
    """
    devices = device_of(state, adapter)
    for name, slot in slots.items():
        slot.set(values[name].to(devices[name.partition(".")[0]]))
    adapter.group_by_module([head_site(state, path.replace("/", ".")) for path in adapter.heads])
    check_strength(adapter, strength)
    adapter.strength = strength
    state.insert(adapter, check_usable=True)
