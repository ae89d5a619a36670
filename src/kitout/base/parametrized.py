"""Weights that a module computes from other parameters: weight norm, spectral norm, any parametrization, pruning.

Both of torch's forms are known: `torch.nn.utils.parametrize` (a property on the class) and the older hooks, which write
the weight as an attribute before every forward. Writing a weight means finding parameters from which the module
computes it, and checking that it does. It knows nothing of adapters or of how weights are used.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kitout.errors import NotMergeable

TOLERANCE = 1e-5  # of a computed weight, relative to the largest value


def is_computed(module: nn.Module, name: str = "weight") -> bool:
    """True where the module holds no parameter of this name and computes a tensor instead."""
    if parametrize.is_parametrized(module, name):
        return True
    return name not in module._parameters and isinstance(module.__dict__.get(name), Tensor)


def weight_or_bias(module: nn.Module, name: str) -> Tensor | None:
    """The module's tensor of this name, computed anew where it is computed; None where there is none."""
    if not is_computed(module, name):
        return module._parameters.get(name)
    if (hook := _hook_of(module, name)) is None:
        value: Tensor = getattr(module, name)
    elif isinstance(hook, WeightNorm):
        value = hook.compute_weight(module)
    elif isinstance(hook, SpectralNorm):
        value = hook.compute_weight(module, do_power_iteration=False)
    else:
        value = hook.apply_mask(module)
    return value


def parameters_for(module: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """Values of the module's parameters, by dotted name, that give it this tensor; NotMergeable where none do."""
    if not is_computed(module, name):
        if name not in module._parameters:
            raise NotMergeable(f"{type(module).__name__} has no place for a {name}")
        return {name: value}
    hook = _hook_of(module, name)
    if isinstance(hook, WeightNorm):
        return {f"{name}_g": torch.norm_except_dim(value, 2, hook.dim), f"{name}_v": value}
    if not parametrize.is_parametrized(module, name):
        how = type(hook).__name__ if hook is not None else "its own code"
        mask = module._buffers.get(f"{name}_mask") if isinstance(hook, BasePruningMethod) else None
        if mask is not None and not (value * (mask == 0)).any():
            return {f"{name}_orig": value}
        raise NotMergeable(
            f"{type(module).__name__} computes its {name} by {how}, which cannot give the merged one: let it hold the "
            "weight itself before attach (torch.nn.utils has a remove function for each)"
        )
    # A copy: a parametrization may keep state of its calls.
    computation: Any = copy.deepcopy(module.parametrizations[name]).eval()  # type: ignore[index, union-attr]
    how = " and ".join(type(part).__name__ for part in computation)
    refusal = (
        f"{type(module).__name__} computes its {name} by {how}, which cannot give the merged one: before attach, "
        f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
    )
    try:
        originals = value
        for part in reversed(computation):
            originals = part.right_inverse(originals)
        # A sequence has one parameter per item.
        single = isinstance(originals, Tensor)
        values = {"original": originals} if single else {f"original{i}": t for i, t in enumerate(originals)}
        for key, tensor in values.items():
            computation._parameters[key] = nn.Parameter(tensor.clone(), requires_grad=False)
        again = computation()
    except Exception as error:  # whatever a parametrization does where it has no inverse
        raise NotMergeable(f"{refusal} ({type(error).__name__}: {str(error)[:80]})") from None
    if again.shape != value.shape or not (again - value).abs().max() <= TOLERANCE * value.abs().max():
        raise NotMergeable(refusal)
    return {f"parametrizations.{name}.{key}": tensor for key, tensor in values.items()}


def _hook_of(module: nn.Module, name: str) -> Any:
    """The older kind of hook that computes this tensor, or None."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == name:
            return hook
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook
    return None
