"""Heads in files: how a replaced module is written down so that it can be built again without running foreign code.

Three ways, in this order: a module of the known plain layers is described by its constructor's facts; one that equals
the base's own module at that path in class, settings and shapes is "the base's"; for any other class the file keeps
its tensors and the reader has to hand in the module. It knows nothing of adapters, tensors' values or folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kitout.errors import FileError
from kitout.files.adapter_json import HeadEntry

MAX_WIDTH = 2**24
MAX_LAYERS = 64

# What each known layer is built from: argument -> how to read it off a module. Types are checked when read back.
Spec = dict[str, Callable[[Any], Any]]
_width: Spec = {"in_features": lambda m: m.in_features, "out_features": lambda m: m.out_features}
KNOWN_LAYERS: dict[type[nn.Module], Spec] = {
    nn.Linear: {**_width, "bias": lambda m: m.bias is not None},
    nn.LayerNorm: {
        "normalized_shape": lambda m: list(m.normalized_shape),
        "eps": lambda m: m.eps,
        "elementwise_affine": lambda m: m.elementwise_affine,
        "bias": lambda m: m.bias is not None,
    },
    nn.BatchNorm1d: {
        "num_features": lambda m: m.num_features,
        "eps": lambda m: m.eps,
        "momentum": lambda m: m.momentum,
        "affine": lambda m: m.affine,
        "track_running_stats": lambda m: m.track_running_stats,
    },
    nn.RMSNorm: {
        "normalized_shape": lambda m: list(m.normalized_shape),
        "eps": lambda m: m.eps,
        "elementwise_affine": lambda m: m.elementwise_affine,
    },
    nn.Dropout: {"p": lambda m: m.p},
    nn.GELU: {"approximate": lambda m: m.approximate},
    nn.Flatten: {"start_dim": lambda m: m.start_dim, "end_dim": lambda m: m.end_dim},
    nn.LeakyReLU: {"negative_slope": lambda m: m.negative_slope},
    nn.ReLU: {},
    nn.SiLU: {},
    nn.Tanh: {},
    nn.Sigmoid: {},
    nn.Softplus: {"beta": lambda m: m.beta, "threshold": lambda m: m.threshold},
    nn.Identity: {},
}
BY_NAME = {cls.__name__: cls for cls in KNOWN_LAYERS}


def spec_of(path: str, head: nn.Module, base: nn.Module) -> HeadEntry:
    """The record of one head."""
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    spec = _spec(head)
    if spec is None and _is_same_module(head, base.get_submodule(path)):
        spec = {"same_as_base": True}
    return HeadEntry(path=path, kind=kind, module=spec)


def build_from_spec(record: HeadEntry, base: nn.Module, head_modules: Mapping[str, nn.Module]) -> nn.Module:
    """The head's module, its values still to be filled; raises FileError if it cannot be told what it is."""
    if record.path in head_modules:
        return head_modules[record.path]
    if record.module is None:
        raise FileError(
            f"the head at {record.path!r} is a {record.kind[:120]}, which a file cannot describe: hand one in, "
            f"kit.load(folder, heads={{{record.path!r}: module}})"
        )
    if record.module == {"same_as_base": True}:
        return blank_copy(base.get_submodule(record.path)).requires_grad_(True)
    try:
        return _build(record.module, [MAX_LAYERS])
    except (TypeError, ValueError, KeyError, RuntimeError, RecursionError, AttributeError) as error:
        raise FileError(f"the head at {record.path!r} is described wrongly: {str(error)[:200]}") from None


def blank_copy(module: nn.Module) -> nn.Module:
    """The module with no trace of kitout and its tensors on the meta device."""
    cls = plain_class(module)
    twin = cls.__new__(cls)
    twin.__dict__.update({k: v for k, v in module.__dict__.items() if not k.startswith("_kitout")})
    twin._parameters = {k: _empty_like(v) for k, v in module._parameters.items()}
    twin._buffers = {k: _empty_like(v) for k, v in module._buffers.items()}
    twin._modules = {k: None if m is None else blank_copy(m) for k, m in module._modules.items()}
    return twin


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, taps aside."""
    cls: type[nn.Module] = type(module)
    while "kitout_base" in cls.__dict__:  # the model itself has two of ours, one on the other
        cls = cls.__dict__["kitout_base"]
    return cls


def _empty_like(tensor: Any) -> Any:
    """On the meta device; packed tensors of other classes stay what they are."""
    if tensor is None or type(tensor.data) is not torch.Tensor:
        return tensor
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _spec(module: nn.Module) -> dict[str, Any] | None:
    if type(module) is nn.Sequential:
        inner = [_spec(m) for m in module]
        named = [name for name, _ in module.named_children()]
        plain = named == [str(i) for i in range(len(named))]
        return {"Sequential": inner} if plain and None not in inner else None
    facts = KNOWN_LAYERS.get(type(module))
    if facts is None or _is_customized(module):
        return None
    return {type(module).__name__: {name: read(module) for name, read in facts.items()}}


def _is_customized(module: nn.Module) -> bool:
    """Parametrised (weight norm) or given its own forward: then it is not what its class says."""
    return "forward" in module.__dict__ or "parametrizations" in module._modules or bool(module._forward_hooks)


def _build(spec: Any, remaining: list[int]) -> nn.Module:
    """A module from its description; `left` counts down so that a description cannot ask for millions of layers."""
    remaining[0] -= 1
    if remaining[0] < 0:
        raise ValueError(f"more than {MAX_LAYERS} layers")
    if not isinstance(spec, dict) or len(spec) != 1:
        raise ValueError("a layer is one name with its settings")
    ((name, facts),) = spec.items()
    if name == "Sequential":
        return nn.Sequential(*(_build(inner, remaining) for inner in facts))
    cls = BY_NAME[name] if name in BY_NAME else _refuse_unknown(name)
    if not isinstance(facts, dict) or set(facts) != set(KNOWN_LAYERS[cls]):
        raise ValueError(f"{name} needs exactly {', '.join(KNOWN_LAYERS[cls]) or 'no settings'}")
    for value in facts.values():
        _check(value)
    with torch.device("meta"):
        return cls(**facts)


def _refuse_unknown(name: str) -> type[nn.Module]:
    raise ValueError(f"{name[:40]!r} is none of {', '.join(BY_NAME)}, Sequential")


def _check(value: Any) -> None:
    if isinstance(value, list):
        for v in value:
            _check(v)
    elif isinstance(value, int) and not -MAX_WIDTH < value < MAX_WIDTH:
        raise ValueError(f"{value} is no width")
    elif not isinstance(value, (int, float, bool, str, type(None))):
        raise ValueError(f"{type(value).__name__} is no setting")


def _is_same_module(head: nn.Module, base_module: nn.Module) -> bool:
    """Same class, same printed settings, same tensors: then the base's own module is the description."""
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (head, base_module)]
    same = plain_class(head) is plain_class(base_module) and repr(head) == repr(base_module) and shapes[0] == shapes[1]
    return same and not _is_customized(head)
