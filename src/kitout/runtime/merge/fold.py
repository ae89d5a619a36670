"""Folding: adapters computed into the weights of the modules they sit at, each on what the one before has left.

In fp32 (fp64 for an fp64 base), in stack order, cast to the base's dtype once by whoever writes them. It changes no
model and knows no method: only `Delta.fold`, and `base.weights` for how weights are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kitout.base import weights
from kitout.base.site import Site
from kitout.errors import Errors, NotMergeable
from kitout.runtime.adapter import Adapter, conflict_with_head
from kitout.runtime.head import Head
from kitout.runtime.modules.module_adapter import ModuleAdapter, SiteDelta

WeightBias = tuple[Tensor, Tensor | None]


@dataclass
class FoldedWeights:
    """The new values of one module."""

    site: Site
    """One of the sites there."""
    weight_bias: WeightBias | None = None
    """Weight and bias of a matrix."""
    parameters: dict[str, Tensor] | None = None
    """Parameters by name."""
    head: nn.Module | None = None
    """The module that takes its place."""


@torch.no_grad()
def fold_all(adapters: Sequence[Adapter]) -> dict[str, FoldedWeights]:
    """New weights for every module the adapters sit at; all errors collected, NotMergeable raised once."""
    folded: dict[str, FoldedWeights] = {}
    errors = Errors(NotMergeable, "cannot merge " + " then ".join(repr(a.name) for a in adapters))
    if conflict := conflict_with_head(adapters):
        errors.add(conflict)
    for adapter in adapters:
        for part in [*adapter.prefixes.values(), *(p for each in adapter.prompts.values() for p in each)][:2]:
            errors.add(f"{part.site.path} ({adapter.name}): virtual tokens cannot be merged into weights")
    for path in dict.fromkeys(p for a in adapters for p in a.by_module):
        module_adapters = [a.by_module[path] for a in adapters if path in a.by_module]
        try:
            folded[path] = _fold_module(module_adapters)
        except NotMergeable as reason:
            if len(errors.messages) < 8:
                errors.add(f"{path} ({module_adapters[0].name}): {reason}")
    names = [f"{path}.{name}".lstrip(".") for path, new in folded.items() for name in new.parameters or {}]
    for name in (name for name, n in Counter(names).items() if n > 1):
        errors.add(f"{name} is trained whole by one adapter and changed by another: merge one of them")
    errors.raise_if_any()
    return folded


def _fold_module(module_adapters: Sequence[ModuleAdapter]) -> FoldedWeights:
    site = module_adapters[0].site
    if any(m.on_weights for m in module_adapters):
        return FoldedWeights(site, parameters=_fold_read_weights(module_adapters))
    last = next((p for module_adapter in reversed(module_adapters) for p in reversed(module_adapter.on_output)), None)
    if last is not None and isinstance(last.delta, Head):
        if module_adapters[-1].strength != 1.0:
            raise NotMergeable(f"a head at strength {module_adapters[-1].strength:g} is a blend of two modules")
        return FoldedWeights(site, head=last.delta.module)
    if site.kind in ("linear", "conv", "embedding"):
        return FoldedWeights(site, weight_bias=_fold_matrix(site, module_adapters))
    return FoldedWeights(site, parameters=_fold_parameters(site, module_adapters))


def _fold_read_weights(module_adapters: Sequence[ModuleAdapter]) -> dict[str, Tensor]:
    """The weights that a module multiplies by itself, by name, and whatever other parameters of it are trained."""
    rest = [replace(m, on_weights=()) for m in module_adapters if m.on_output or m.on_input or m.on_parameters]
    others = _fold_module(rest).parameters if rest else {}
    if others is None:
        raise NotMergeable(f"{type(rest[0].on_output[0].delta).__name__} acts on what is computed by weights read here")
    read = {name for m in module_adapters for p in m.on_weights for name in p.read_names}
    if both := sorted(read & others.keys()):
        raise NotMergeable(f"{both[0]} is trained whole by one adapter and changed by another: merge one of them")
    start: dict[str, Tensor] = {}
    for part in (p for m in module_adapters for p in m.on_weights):
        weight = weights.weight_matrix(part.site.module, part.site.weight_name)
        for name, own in zip(part.read_names, (part.site.weight_name, part.site.bias_name), strict=False):
            parameter = part.site.module._parameters[own]
            value = weight.new_zeros(weight.shape[0]) if parameter is None else parameter.detach()
            start[name] = value.to(working_dtype(value))
    now = start
    for module_adapter in module_adapters:
        now = module_adapter.map_weights(now)
    return others | {name: value for name, value in now.items() if value is not start[name]}


def _fold_matrix(site: Site, module_adapters: Sequence[ModuleAdapter]) -> WeightBias:
    """Weight and bias of a linear, a convolution or a table, each adapter on what the one before has left."""
    if not all(
        part.delta.replaces_module for module_adapter in module_adapters for part in module_adapter.on_output
    ):  # a whole copy is exact anywhere
        weights.check_is_linear(site)
    w, b = weights.weight_matrix(site.module), weights.bias(site.module)
    pair = start = w.to(working_dtype(w)), None if b is None else b.to(working_dtype(w))
    for module_adapter in module_adapters:
        pair = fold_adapter(module_adapter, pair, start)
    return pair


def fold_adapter(module_adapter: ModuleAdapter, pair: WeightBias, start: WeightBias) -> WeightBias:
    """One adapter on what is there. start: the frozen values, for a Delta that replaces the module."""
    new = pair
    for part in module_adapter.on_output:
        new = part.fold(*(start if part.delta.replaces_module else new))
    pair = new = blend(
        pair, new, module_adapter.strength
    )  # as in forward: output and input are blended each on its own
    for part in module_adapter.on_input:
        new = _fold_in(part, new)
    return blend(pair, new, module_adapter.strength)


def working_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _fold_in(part: SiteDelta, pair: WeightBias) -> WeightBias:
    """x' = D x + t before W: W' = W D, b' = b + W t. D is diagonal where the delta is elementwise."""
    w, b = pair
    if part.site.kind != "linear":
        raise NotMergeable(f"{type(part.delta).__name__} acts on the input of a {part.site.kind}, not of a linear")
    if part.delta.is_scale_shift:
        scale, shift = part.delta.fold(w.new_ones(w.shape[1], 1), None)
        new = w * scale[:, 0]
    else:
        matrix, shift = part.delta.fold(torch.eye(w.shape[1], dtype=w.dtype, device=w.device), None)
        new = w @ matrix
    if shift is not None:
        b = w @ shift if b is None else b + w @ shift
    return new, b


def blend(old: WeightBias, new: WeightBias, strength: float) -> WeightBias:
    if strength == 1.0:
        return new
    w = old[0] + strength * (new[0] - old[0])
    if old[1] is None and new[1] is None:
        return w, None
    zero = w.new_zeros(w.shape[0])
    old_b, new_b = (zero if b is None else b for b in (old[1], new[1]))
    return w, old_b + strength * (new_b - old_b)


def _fold_parameters(site: Site, module_adapters: Sequence[ModuleAdapter]) -> dict[str, Tensor]:
    """The parameters, by name, of a norm or of a module that is no matrix either."""
    own = [n for n, _ in site.module.named_parameters(recurse=False)]
    trained = [
        n
        for module_adapter in module_adapters
        for part in module_adapter.on_parameters
        for n in part.site.parameter_names
    ]
    parameters = {n: site.module.get_parameter(n) for n in (*own, *trained)}
    start = now = {n: p.to(working_dtype(p)) for n, p in parameters.items() if p.is_floating_point()}
    for module_adapter in module_adapters:
        if module_adapter.on_input:
            raise NotMergeable(
                f"{type(module_adapter.on_input[0].delta).__name__} acts on the input of a module that is no linear"
            )
        new = now
        for part in (*module_adapter.on_output, *module_adapter.on_parameters):
            new = _fold_values(part, start if part.delta.replaces_module else new)
        if module_adapter.strength != 1.0:
            new = {n: torch.lerp(now.get(n, torch.zeros_like(v)), v, module_adapter.strength) for n, v in new.items()}
        now = new
    return {n: v for n, v in now.items() if v is not start.get(n)}


def _fold_values(part: SiteDelta, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, after one Delta: whole values, or scale and shift folded into a norm."""
    site, delta = part.site, part.delta
    values = delta.parameter_values()
    if values is not None:
        return parameters | {n: v.to(parameters[n].dtype) for n, v in values.items()}
    if site.kind != "norm" or not delta.is_scale_shift:
        raise NotMergeable(f"{type(delta).__name__} has no place in a {type(site.module).__name__}")
    if "weight" not in parameters:
        raise NotMergeable(f"{type(site.module).__name__} has no gain")
    one = torch.ones_like(parameters["weight"])
    scale, shift = delta.fold(one[:, None], None)
    return weights.fold_into_norm(site.module, parameters, scale[:, 0], shift)
