"""The frozen module seen as a matrix: the one file that knows how weights are stored.

Linear [out, in], Conv1D-like [in, out], convolutions [out, in, *kernel], embedding tables [V, d], norm gains stored as
g or as 1 + g, channel subsets of fused projections, quantized storage. Everything else sees w [d_out, d_in] and
b [d_out] | None. It knows nothing of adapters, routes or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kitout.base.site import Site
from kitout.errors import NotMergeable


def is_conv1d(module: nn.Module) -> bool:
    """True where the weight is stored [in, out] (transformers' Conv1D marks itself by `nf`)."""
    return "nf" in module.__dict__ and "weight" in module._parameters


def is_plain_float(module: nn.Module, name: str = "weight") -> bool:
    """True where the weight is an ordinary floating-point tensor (not packed, quantized or a tensor subclass)."""
    w = module._parameters.get(name)
    return w is not None and type(w.data) is Tensor and w.is_floating_point() and w.dtype.itemsize >= 2


def weight_matrix(module: nn.Module, name: str = "weight") -> Tensor:
    """The module's weight as a [d_out, d_in] view in its own dtype; raises NotMergeable for quantized storage."""
    w = module._parameters.get(name)
    if w is None or not is_plain_float(module, name):
        kind = type(w.data).__name__ if w is not None else f"no parameter named {name}"
        raise NotMergeable(f"{type(module).__name__} stores its weight as {kind}, not as plain floating-point values")
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise NotMergeable(f"{type(module).__name__} has no place for a change of its weight as a matrix")
    return as_matrix(w, is_transposed(module))


def as_matrix(w: Tensor, transpose: bool) -> Tensor:
    """A stored weight as a [d_out, d_in] view. transpose: see `is_transposed`."""
    return w.T if transpose else w.flatten(1) if w.ndim > 2 else w


def is_transposed(module: nn.Module) -> bool:
    """True where the first axis of the stored weight is the input's: tables and transposed linears."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def as_stored(module: nn.Module, w: Tensor, shape: torch.Size) -> Tensor:
    """A [d_out, d_in] matrix in the module's own layout: the reverse of `as_matrix`."""
    return w.T if is_transposed(module) else w.view(shape)


def parameter_at(module: nn.Module, name: str) -> Tensor | None:
    """The parameter of a module or of a child of it by its dotted name; None where there is none now."""
    owner, last = _owner_of(module, name)
    return owner._parameters.get(last)


def bias(module: nn.Module, name: str = "bias") -> Tensor | None:
    """The module's bias [d_out], or None."""
    return module._parameters.get(name)


def apply_weight(site: Site, x: Tensor, w: Tensor) -> Tensor:
    """The site's own linear map with other weights: x as the module takes it, w [r, d_in] -> [..., r], channels last.

    d_in is the width of the flattened weight: in * kernel for a convolution, the vocabulary for an embedding.
    """
    module = site.module
    if isinstance(module, nn.Embedding):
        return F.embedding(x, w.T, module.padding_idx)
    if site.kind == "conv":
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]
        kernel = w.view(w.shape[0], -1, *module.kernel_size)
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            return conv(x, kernel, None, module.stride, 0, module.dilation, module.groups).movedim(1, -1)
        return conv(x, kernel, None, module.stride, module.padding, module.dilation, module.groups).movedim(1, -1)
    return F.linear(x, w)


@torch.no_grad()
def is_matrix_product(module: nn.Module) -> bool:
    """False where a linear's class has a forward of its own that is another map, which random input shows.

    On the meta device only the shape of the result is compared. Quantized linears are not tried.
    """
    if unhooked_forward(module) in (nn.Linear.forward, Conv1D.forward) or not is_plain_float(module):
        return True
    w = as_matrix(module.get_parameter("weight"), is_transposed(module))
    if w.ndim != 2:
        return False
    x = torch.randn(3, 5, w.shape[1], generator=torch.Generator().manual_seed(0)).to(w.device, w.dtype)
    was_training, module.training = module.training, False
    try:
        y = unhooked_forward(module)(module, x.clone())
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    finally:
        module.training = was_training
    if not isinstance(y, Tensor) or y.shape != (3, 5, w.shape[0]):
        return False
    expected = F.linear(x, w, bias(module))
    return y.is_meta or _are_close(y, expected)


def _are_close(y: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of their dtype."""
    tolerance = 1e-4 if expected.dtype.itemsize > 2 else 3e-2
    return bool((y - expected).abs().max() <= tolerance * expected.abs().max())


@torch.no_grad()
def check_is_linear(site: Site) -> None:
    """NotMergeable where the module is not just its weight times its input: tables that scale what they look up,
    convolutions that standardize their kernel. Classes with a forward of their own are tried on random input.
    """
    module, forward = site.module, unhooked_forward(site.module)
    if forward in (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward):
        return
    w = weight_matrix(module)
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        x = torch.arange(min(8, module.num_embeddings))
    elif site.kind == "conv":
        channels, *kernel = module.get_parameter("weight").shape[1:]
        x = torch.randn(2, channels * getattr(module, "groups", 1), *(4 * k for k in kernel), generator=generator)
    else:
        x = torch.randn(2, w.shape[1], generator=generator)  # a sublayer's site may read something narrower
    x = x.to(w.device, w.dtype) if x.is_floating_point() else x.to(w.device)
    y, expected, b = forward(module, x), apply_weight(site, x, w), bias(module)
    expected = expected if b is None else expected + b
    y = y.movedim(1, -1) if site.channels_first else y
    if y.shape != expected.shape or not _are_close(y, expected):
        raise NotMergeable(
            f"{type(module).__name__} does more than multiply by its weight, so no weight gives the same function"
        )


def fan_in(site: Site) -> int:
    """Width of the flattened weight's input axis (see `apply_weight`)."""
    module = site.module
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    if site.kind == "conv":
        weight = module._parameters["weight"]
        assert weight is not None
        return weight[0].numel()
    return site.d_in


@contextmanager
def swapped_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other values for some of its parameters, restored afterwards. Names may be of its children's."""
    owners = {name: _owner_of(module, name) for name in values}
    originals = {name: owner._parameters[last] for name, (owner, last) in owners.items()}
    try:
        for name, (owner, last) in owners.items():
            owner._parameters[last] = values[name]  # type: ignore[assignment]
        yield
    finally:
        for name, (owner, last) in owners.items():
            owner._parameters[last] = originals[name]


def _owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a dotted parameter name leads to, and the last part of the name."""
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def unhooked_forward(module: nn.Module) -> Callable[..., Any]:
    """The frozen module's own forward, without what kitout adds to its class; it takes the module first."""
    forward: Callable[..., Any] = getattr(type(module), "frozen_forward", type(module).forward)
    return forward


@dataclass(eq=False)
class FrozenModule:
    """What a Delta that reads weights is given: the site's weight rows and bias, and the module as a function."""

    site: Site
    """The site of the Delta."""
    call_args: tuple[Any, ...] = field(default=(), init=False)
    """Arguments of the module's call in progress, for Deltas that replace the call."""
    call_kwargs: dict[str, Any] = field(default_factory=dict, init=False)
    """Keyword arguments of that call."""

    def clear_call(self) -> None:
        """Forget the call: it is over."""
        self.call_args, self.call_kwargs = (), {}

    @property
    def weight(self) -> Tensor:
        w = weight_matrix(self.site.module, self.site.weight_name)
        return w if self.site.channel_index is None else w[self.site.channel_index]

    @property
    def bias(self) -> Tensor | None:
        b = bias(self.site.module, self.site.bias_name)
        return b if b is None or self.site.channel_index is None else b[self.site.channel_index]

    def __call__(self, x: Tensor, values: Mapping[str, Tensor]) -> Any:
        """The module on x, with these values for its parameters and all other arguments of the call in progress."""
        module = self.site.module
        args, kwargs = (x, *self.call_args[1:]), self.call_kwargs
        if not self.call_args and kwargs:
            first = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
            args, kwargs = (), {**kwargs, first: x}
        cast = {name: value.to(module.get_parameter(name).dtype) for name, value in values.items()}
        with swapped_parameters(module, cast):
            return unhooked_forward(module)(module, *args, **kwargs)

    def norm(self, x: Tensor) -> Tensor:
        """The frozen norm after this sublayer."""
        assert self.site.post_norm is not None
        y: Tensor = unhooked_forward(self.site.post_norm)(self.site.post_norm, x)
        return y

    def apply_weight(self, x: Tensor, w: Tensor) -> Tensor:
        return apply_weight(self.site, x, w)


def norm_gain_offset(module: nn.Module) -> float:
    """0.0 where a norm multiplies by its weight, 1.0 where by 1 + weight: measured, not assumed.

    Raises NotMergeable where neither fits, or where the norm is not an elementwise gain at all.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1:
        raise NotMergeable(f"{type(module).__name__} has no 1-D gain to merge into")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.numel(), generator=generator).to(weight.device, torch.float32)
    parameters = {n: p.detach().float() for n, p in module.named_parameters()}
    shift = parameters["bias"] if "bias" in parameters else torch.zeros_like(x[0])

    def run_with_gain(gain: Tensor) -> Tensor:
        with swapped_parameters(module, {**parameters, "weight": gain}):
            return unhooked_forward(module)(module, x) - shift

    zero, one = run_with_gain(torch.zeros_like(x[0])), run_with_gain(torch.ones_like(x[0]))
    normalized = one - zero  # in both conventions
    for offset in (0.0, 1.0):
        if torch.allclose(zero, offset * normalized, atol=1e-5):
            return offset
    raise NotMergeable(f"{type(module).__name__} is neither gain * norm(x) nor (1 + gain) * norm(x)")


def replace_weight(module: nn.Module, w: Tensor, b: Tensor | None) -> None:
    """Give a linear, convolution or embedding new weights, [d_out, d_in] and [d_out] in fp32, cast to its dtype.

    The Parameters are new objects: a tied partner keeps the old values, and the old ones can be restored bit-identical.
    """
    old = module._parameters["weight"]
    assert old is not None
    if isinstance(module, nn.Embedding):
        w, b = (w if b is None else w + b[:, None]), None
    module._parameters["weight"] = _new_parameter(as_stored(module, w, old.shape), old)
    if b is not None:
        if "bias" not in module._parameters:
            raise NotMergeable(f"{type(module).__name__} has no place for a bias")
        module._parameters["bias"] = _new_parameter(b, old)


def fold_into_norm(
    module: nn.Module, parameters: Mapping[str, Tensor], scale: Tensor, shift: Tensor | None
) -> dict[str, Tensor]:
    """A norm's parameters with y' = scale * y + shift merged in: its gain and, where it has or can hold one, its bias.

    parameters: its current ones in working precision.
    """
    offset, new = norm_gain_offset(module), dict(parameters)
    new["weight"] = (parameters["weight"] + offset) * scale - offset
    if "bias" in parameters:
        new["bias"] = parameters["bias"] * scale
    if shift is not None and bool(shift.any()):
        if "bias" not in module._parameters:
            raise NotMergeable(f"{type(module).__name__} is a norm without a bias: it can take a scale, not a shift")
        new["bias"] = shift if "bias" not in parameters else new["bias"] + shift
    return new


def replace_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a module new parameters, cast to the dtype of the old ones. Names may be of its children's."""
    for name, value in values.items():
        owner, last = _owner_of(module, name)
        old = owner._parameters[last]
        if old is None:
            old = next(p for p in owner._parameters.values() if p is not None)
        owner._parameters[last] = _new_parameter(value, old)


def _new_parameter(value: Tensor, old: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.detach().to(old.device, old.dtype).contiguous(), requires_grad=False)
