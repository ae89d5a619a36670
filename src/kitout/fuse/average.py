"""The weighted mean of adapters' own parameters: for what does not fold, prefixes and bottlenecks of one config.

It is no arithmetic over functions: two halves of two prefixes are not half of each. It knows adapters as named tensors
and nothing of methods.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kitout.errors import ConfigError, Errors
from kitout.files.adapter_tensors import tensor_slots
from kitout.fuse.changes import Places
from kitout.fuse.residual import FusedAdapter
from kitout.fuse.result import NewAdapter
from kitout.fuse.sources import Source
from kitout.runtime.adapter import Adapter
from kitout.runtime.state import KitState

OF_TRAINING = {"init", "dropout"}  # settings that do not change what an adapter computes once it is trained


@torch.no_grad()
def average_parameters(
    state: KitState, name: str, adapters: Sequence[Adapter], weights: Sequence[float]
) -> FusedAdapter:
    """A new adapter of their config, whose parameters are the weighted mean of theirs."""
    adapters = [adapter.inference_form() for adapter in adapters]
    first = adapters[0]
    if abs(sum(weights)) < 1e-8:
        raise ConfigError(f"how='parameters' divides by the sum of the weights, and {list(weights)} add up to 0")
    errors = Errors(ConfigError, "how='parameters' averages adapters of one config")
    if routes := [repr(adapter.name) for adapter in adapters if adapter.method.fixed_route() is not None]:
        raise ConfigError(f"{', '.join(routes)}: a route has no parameters to average; name the adapters in it")
    if all(state[each].method.mergeable for each in state.names_with_parts(adapter.name for adapter in adapters)):
        kind = type(first.method).__name__
        errors.add(f"{kind} folds into weights: how='mean' averages what the adapters do, not their parameters")
    for other in adapters[1:]:
        if type(other.method) is not type(first.method):
            errors.add(f"{first.name!r} is {type(first.method).__name__}, {other.name!r} {type(other.method).__name__}")
            continue
        ours, theirs = (a.method.model_dump(exclude=OF_TRAINING) for a in (first, other))
        changed = [f"{k}={ours[k]!r} and {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]
        if changed:
            errors.add(f"{first.name!r} and {other.name!r} have {', '.join(changed)}")
        elif first.heads or other.heads:
            errors.add(f"{(first if first.heads else other).name!r} has a head: heads are not averaged")
    for adapter in adapters:
        if adapter.strength != 1.0:
            errors.add(f"{adapter.name!r} has the strength {adapter.strength:g}: a mean takes it at 1")
    errors.raise_if_any()
    slots = [tensor_slots(adapter) for adapter in adapters]
    values: dict[str, Tensor] = {}
    for key, slot in slots[0].items():
        if slot.tensor.is_floating_point():
            stacked = torch.stack([w / sum(weights) * s[key].tensor for s, w in zip(slots, weights, strict=True)])
            values[key] = stacked.sum(0)
        else:
            values[key] = slot.tensor.detach().clone()
    note = {"how": "parameters", "weights": {a.name: w for a, w in zip(adapters, weights, strict=True)}}
    sources = [Source(adapter, adapter.name, [adapter]) for adapter in adapters]
    new = NewAdapter(state, Places(state.survey), name, sources, note=note)
    return FusedAdapter(new.register(first.method, first.sites, values), new.residual, new.dropped)
