"""Heads in files: how a replaced module is described so that it can be built again without running foreign code.

Three ways, in this order. A module of the known layers is described by its constructor's arguments. A module that
equals the base's own at that path in class, settings and shapes is described as "the same as the base". For any other
class the file keeps the tensors, and the reader passes the module. It knows nothing of adapters, values or folders.
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

# What each known layer is built from: argument -> how to read it from a module. Types are checked when a file is read.
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
    """The entry of one head in adapter.json."""
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    spec = _spec(head)
    if spec is None and _is_same_module(head, base.get_submodule(path)):
        spec = {"same_as_base": True}
    return HeadEntry(path=path, kind=kind, module=spec)


def build_from_spec(record: HeadEntry, base: nn.Module, head_modules: Mapping[str, nn.Module]) -> nn.Module:
    """The head's module, its values still to be filled; raises FileError if the entry does not describe one."""
    if record.path in head_modules:
        return head_modules[record.path]
    if record.module is None:
        raise FileError(
            f"the head at {record.path!r} is a {record.kind[:120]}, which a file cannot describe: pass one, "
            f"kit.load(folder, heads={{{record.path!r}: module}})"
        )
    if record.module == {"same_as_base": True}:
        return blank_copy(base.get_submodule(record.path)).requires_grad_(True)
    try:
        return _build(record.module, [MAX_LAYERS])
    except (TypeError, ValueError, KeyError, RuntimeError, RecursionError, AttributeError) as error:
        raise FileError(f"the head at {record.path!r} has an invalid description: {str(error)[:200]}") from None


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
    """The class of a module without those that kitout has put on it."""
    cls: type[nn.Module] = type(module)
    while "kitout_base" in cls.__dict__:  # the model itself has two of them
        cls = cls.__dict__["kitout_base"]
    return cls


def _empty_like(tensor: Any) -> Any:
    """The tensor on the meta device; packed tensors of other classes are kept."""
    if tensor is None or type(tensor.data) is not torch.Tensor:
        return tensor
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _spec(module: nn.Module) -> dict[str, Any] | None:
    if type(module) is nn.Sequential:
        layers = [_spec(m) for m in module]
        names = [name for name, _ in module.named_children()]
        is_numbered = names == [str(i) for i in range(len(names))]
        return {"Sequential": layers} if is_numbered and None not in layers else None
    arguments = KNOWN_LAYERS.get(type(module))
    if arguments is None or _is_customized(module):
        return None
    return {type(module).__name__: {name: read(module) for name, read in arguments.items()}}


def _is_customized(module: nn.Module) -> bool:
    """Parametrized (weight norm), hooked or with a forward of its own: then it is not what its class says."""
    return "forward" in module.__dict__ or "parametrizations" in module._modules or bool(module._forward_hooks)


def _build(spec: Any, remaining: list[int]) -> nn.Module:
    """A module from its description. `remaining` counts down: no description may ask for millions of layers."""
    remaining[0] -= 1
    if remaining[0] < 0:
        raise ValueError(f"more than {MAX_LAYERS} layers")
    if not isinstance(spec, dict) or len(spec) != 1:
        raise ValueError("a layer is one name with its settings")
    ((name, arguments),) = spec.items()
    if name == "Sequential":
        return nn.Sequential(*(_build(layer, remaining) for layer in arguments))
    if name not in BY_NAME:
        raise ValueError(f"{name[:40]!r} is none of {', '.join(BY_NAME)}, Sequential")
    cls = BY_NAME[name]
    if not isinstance(arguments, dict) or set(arguments) != set(KNOWN_LAYERS[cls]):
        raise ValueError(f"{name} needs exactly {', '.join(KNOWN_LAYERS[cls]) or 'no settings'}")
    for value in arguments.values():
        _check(value)
    with torch.device("meta"):
        return cls(**arguments)


def _check(value: Any) -> None:
    if isinstance(value, list):
        for v in value:
            _check(v)
    elif isinstance(value, int) and not -MAX_WIDTH < value < MAX_WIDTH:
        raise ValueError(f"{value} is not a width")
    elif not isinstance(value, (int, float, bool, str, type(None))):
        raise ValueError(f"{type(value).__name__} is not a setting")


def _is_same_module(head: nn.Module, base_module: nn.Module) -> bool:
    """Same class, same printed settings, same tensors: then the base's own module is the description."""
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (head, base_module)]
    same = plain_class(head) is plain_class(base_module) and repr(head) == repr(base_module) and shapes[0] == shapes[1]
    return same and not _is_customized(head)
