"""Trained biases of PEFT's LoRA files, read and written: bias="lora_only", bias="all" and lora_bias=True.

The first two hold whole biases of the base, under its modules' own names (".base_layer.bias" where there is a LoRA).
lora_bias is one of B, so LoRA's scale multiplies it. kitout holds the difference from the base's bias, without a scale.
It knows nothing of folders or json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.errors import Errors
from kitout.files.base_fingerprint import parameters_before_merge
from kitout.files.peft.config import PeftConfig
from kitout.files.peft.read_tensors import PREFIX, PeftModuleTensors
from kitout.methods import LoRA
from kitout.methods.lora import BIAS
from kitout.runtime.adapter import Adapter
from kitout.runtime.state import KitState

COPIES = ".original_module.", ".modules_to_save."


def take_biases(settings: PeftConfig, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the biases of the base from the tensors of a file and returns them by their full name in the base."""
    if settings.bias != "all" and settings.bias != "lora_only":
        return {}
    biases = {}
    for key in [k for k in stored if k.startswith(PREFIX) and _is_bias(k)]:
        if any(copy in key for copy in COPIES):  # of a head, which is in the file under its own name too
            del stored[key]
            continue
        full_name = key.removeprefix(PREFIX).replace(".base_layer", "")
        path = full_name.rpartition(".")[0]
        if not any(f".{name}." in f".{path}." or path.endswith(name) for name in settings.modules_to_save):
            biases[full_name] = stored.pop(key)
    return biases


def _is_bias(key: str) -> bool:
    """A bias of a module, or of torch's attention (in_proj_bias)."""
    return key.endswith((".bias", "_bias")) and not key.endswith(".lora_B.bias")


def read_shifts(
    state: KitState,
    method: LoRA,
    chosen: Sequence[Site],
    parts: Mapping[str, PeftModuleTensors],
    biases: Mapping[str, Tensor],
    errors: Errors,
) -> dict[str, Tensor]:
    """By module path what the adapter adds to each bias; a bias that no site holds must be that of the base.

    chosen: the sites of the adapter.
    """
    sites = {s.path: s for s in chosen if s.path not in parts or parts[s.path].has_shift}
    shifts, by_id = {}, {}
    for path, site in sites.items():
        shift, full_name = torch.zeros(site.d_out), f"{path}.{site.bias_name}"
        own: Any = site.module._parameters.get(site.bias_name)
        by_id[id(own)] = full_name
        if full_name in biases:
            if own is None or own.shape != biases[full_name].shape:
                errors.add(f"{full_name} has shape {list(biases[full_name].shape)}, and this base has no such bias")
                continue
            shift = biases[full_name].float() - own.detach().float().cpu()
        of_b = parts[path].bias if path in parts else None
        if of_b is not None:
            shift = shift + method.scale_at(site) * of_b.float()
        shifts[path] = shift
    for full_name in biases.keys() - set(by_id.values()):
        path, _, name = full_name.rpartition(".")
        if path in state.survey.unused:
            continue  # it has no effect in PEFT either
        try:
            own = state.base.get_submodule(path)._parameters.get(name)
        except AttributeError:
            own = None
        expected = None if own is None else own.detach().float().cpu()
        if by_id.get(id(own)) in biases:  # tied to a bias that a site holds
            expected = biases[by_id[id(own)]].float()
        if expected is None or expected.shape != biases[full_name].shape:
            errors.add(f"this model has no bias {full_name[:120]!r} of shape {list(biases[full_name].shape)}")
        elif not torch.allclose(expected, biases[full_name].float(), rtol=2**-7, atol=1e-6):
            errors.add(f"{full_name[:120]} differs from this base's own, and nothing here can hold a trained one")
    return shifts


def write_biases(
    state: KitState, adapter: Adapter, parts: Mapping[str, PeftModuleTensors], errors: Errors
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key without prefix, and the fields bias and lora_bias. `parts` get the biases of their B.

    With lora_bias all that is added at a target is a bias of its B, also a change of the base's own.
    """
    method = adapter.method
    assert isinstance(method, LoRA)
    if method.bias == "none" and not method.lora_bias:
        return {}, {"bias": "none"}
    unmerged = parameters_before_merge(state)
    tensors: dict[str, Tensor] = {}
    for site in adapter.sites:
        if site.parameter_names == BIAS:
            own = _bias(state, site.path, unmerged, site.bias_name)
            assert own is not None
            shift: Any = adapter.delta(site).shift
            tensors[f"{site.path}.{site.bias_name}"] = own.float() + adapter.strength * shift
    for path, part in parts.items():
        own = _bias(state, path, unmerged)
        if not method.lora_bias:
            if own is not None and part.shift is not None:
                tensors[f"{path}.base_layer.bias"] = own.float() + part.shift
        elif part.shift is None:
            errors.add(f"{path}: PEFT has no lora_bias over an embedding")
        elif method.dora:
            errors.add(f"{path}: PEFT has no lora_bias with DoRA")
        else:
            scale = part.alpha / (part.rank**0.5 if method.rslora else part.rank)
            part.values[".lora_B.bias"] = part.shift / scale
    return tensors, {"bias": method.bias, "lora_bias": method.lora_bias}


def _bias(state: KitState, path: str, unmerged: Mapping[int, Tensor], name: str = "bias") -> Tensor | None:
    """The base's own bias, also while something is merged into it."""
    module: nn.Module = state.base.get_submodule(path)
    own = module._parameters.get(name)
    return None if own is None else unmerged.get(id(own), own).detach()
