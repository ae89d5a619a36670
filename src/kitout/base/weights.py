"""The frozen module seen as a matrix: the one file that knows how weights are stored.

Linear [out, in], Conv1D-like [in, out], convolutions (`convolutions.py`), embedding tables [V, d], channel subsets of
fused projections, quantized storage, computed weights (`parametrized.py`). Everything else sees w [d_out, d_in] and
b [d_out] | None. It knows nothing of adapters, routes or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout.base import convolutions, own_forward, parametrized
from kitout.base.own_forward import (
    HALF_TOLERANCE,
    TOLERANCE,
    has_plain_forward,
    has_plain_linear_forward,
    owner_of,
    swapped_parameters,
    unhooked_forward,
)
from kitout.base.site import Site
from kitout.errors import NotMergeable, TargetError

Convolution = nn.modules.conv._ConvNd


def is_conv1d(module: nn.Module) -> bool:
    """True where the weight is stored [in, out] (transformers' Conv1D marks itself by `nf`)."""
    return "nf" in module.__dict__ and ("weight" in module._parameters or parametrized.is_computed(module))


def is_plain_float(module: nn.Module, name: str = "weight") -> bool:
    """True where the weight is an ordinary floating-point tensor (not packed, quantized or a tensor subclass)."""
    return _is_plain_float(parametrized.weight_or_bias(module, name))


def _is_plain_float(w: Tensor | None) -> bool:
    return w is not None and type(w.data) is Tensor and w.is_floating_point() and w.dtype.itemsize >= 2


def floating_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of a module's first floating-point parameter; the default where it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


def weight_matrix(module: nn.Module, name: str = "weight") -> Tensor:
    """The module's weight as a [d_out, d_in] view in its own dtype; raises NotMergeable for quantized storage."""
    w = parametrized.weight_or_bias(module, name)
    if w is None or not _is_plain_float(w):
        kind = type(w.data).__name__ if w is not None else f"no parameter named {name}"
        raise NotMergeable(f"{type(module).__name__} stores its weight as {kind}, not as plain floating-point values")
    return to_matrix(module, w)


def to_matrix(module: nn.Module, w: Tensor) -> Tensor:
    """A weight in the module's own layout as a [d_out, d_in] view."""
    if isinstance(module, Convolution):
        return convolutions.kernel_to_matrix(module, w)
    return as_matrix(w, is_transposed(module))


def as_matrix(w: Tensor, transpose: bool) -> Tensor:
    """A stored weight as a [d_out, d_in] view. transpose: see `is_transposed`."""
    return w.T if transpose else w.flatten(1) if w.ndim > 2 else w


def is_transposed(module: nn.Module) -> bool:
    """True where the first axis of the stored weight is the input's: tables and transposed linears."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def as_stored(module: nn.Module, w: Tensor, shape: torch.Size) -> Tensor:
    """A [d_out, d_in] matrix in the module's own layout: the reverse of `to_matrix`."""
    if isinstance(module, Convolution):
        return convolutions.matrix_to_kernel(module, w)
    return w.T if is_transposed(module) else w.reshape(shape)


def parameter_at(module: nn.Module, name: str) -> Tensor | None:
    """The parameter of a module or of a child of it by its dotted name; None where there is none now."""
    owner, last = owner_of(module, name)
    return owner._parameters.get(last)


def bias(module: nn.Module, name: str = "bias") -> Tensor | None:
    """The module's bias [d_out], or None."""
    return parametrized.weight_or_bias(module, name)


def apply_weight(site: Site, x: Tensor, w: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """The site's own linear map with other weights: x as the module takes it, w [r, d_in] -> [..., r], channels last.

    d_in is the width of the flattened weight: in / groups * kernel for a convolution, the vocabulary for an embedding.
    size: of a convolution's output.
    """
    module = site.module
    if isinstance(module, nn.Embedding):
        return F.embedding(x, w.T, module.padding_idx)
    if site.kind == "conv":
        assert isinstance(module, Convolution)
        return convolutions.convolve(module, x, w, size)
    return F.linear(x, w)


def apply_low_rank(site: Site, x: Tensor, a: Tensor, b: Tensor, y: Tensor, by_own_forward: bool = False) -> Tensor:
    """`apply_weight` for B A without forming the product where that saves work: a [r, d_in], b [d_out, r], y the
    module's own output, channels last. In a grouped convolution every group has its own rows of B and all of A.

    by_own_forward: of a convolution whose class has one of its own.
    """
    module, size = site.module, y.shape[1:-1]
    if not isinstance(module, Convolution):
        return F.linear(apply_weight(site, x, a), b)
    if module.groups == 1 and not by_own_forward:
        change = F.linear(apply_weight(site, x, a, size), b)
        if change.shape[:-1] != y.shape[:-1]:
            raise TargetError(
                f"{site.path}: {type(module).__name__} pads or crops by a forward of its own and is not linear in its "
                "weight, so a change of its weight cannot be added; choose a method that acts on outputs (IA3, SSF)"
            )
        return change
    index = site.channel_index
    if index is not None:  # the groups divide the whole output
        b = b.new_zeros(module.out_channels, b.shape[1]).index_put((torch.arange(module.out_channels)[index],), b)
    if by_own_forward:
        change = own_forward.run_with(module, x, b @ a).movedim(1, -1)
    elif module.groups * a.shape[0] < module.out_channels:
        h = apply_weight(site, x, a.repeat(module.groups, 1), size).unflatten(-1, (module.groups, -1))
        change = torch.einsum("...gr,gor->...go", h, b.unflatten(0, (module.groups, -1))).flatten(-2)
    else:
        change = apply_weight(site, x, b @ a, size)
    return change if index is None else change[..., index]


@torch.no_grad()
def is_matrix_product(module: nn.Module) -> bool:
    """False where a linear's class has a forward of its own that is another map, which random input shows.

    On the meta device only the shape of the result is compared. Quantized linears are not tried.
    """
    if has_plain_linear_forward(module) or not is_plain_float(module):
        return True
    w = weight_matrix(module)
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
    tolerance = TOLERANCE if expected.dtype.itemsize > 2 else HALF_TOLERANCE
    return bool((y - expected).abs().max() <= tolerance * expected.abs().max())


@torch.no_grad()
def linear_scale(site: Site) -> float:
    """What the module multiplies its weight's own product by: not 1 in tables that scale what they look up (Gemma).

    NotMergeable where it does more than that, as a convolution that standardizes its kernel. Classes with a forward of
    their own are tried on random input.
    """
    module = site.module
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise NotMergeable(f"{type(module).__name__} shortens the rows it looks up to {module.max_norm:g} (max_norm)")
    if has_plain_forward(module):
        return 1.0
    w = weight_matrix(module)
    if isinstance(module, Convolution):
        if not own_forward.is_linear(module):
            raise NotMergeable(
                f"{type(module).__name__} is not linear in its weight, so no weight gives the same function"
            )
        return 1.0
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        x = torch.arange(min(8, module.num_embeddings))
    else:
        x = torch.randn(2, w.shape[1], generator=generator)  # a sublayer's site may read something narrower
    x = x.to(w.device, w.dtype) if x.is_floating_point() else x.to(w.device)
    try:
        y = unhooked_forward(module)(module, x)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:  # it takes something else
        raise NotMergeable(
            f"{type(module).__name__} does more than multiply by its weight, so no weight gives the same function "
            f"({type(error).__name__} on plain input)"
        ) from None
    expected, b = apply_weight(site, x, w), bias(module)
    expected = expected if b is None else expected + b
    scale = 1.0
    if isinstance(module, nn.Embedding) and y.shape == expected.shape:
        scale = float((y.double() * expected.double()).sum() / expected.double().square().sum().clamp_min(1e-300))
        expected = scale * expected
        scale = 1.0 if abs(scale - 1.0) < 1e-6 else scale
    if y.shape != expected.shape or scale <= 0 or not _are_close(y, expected):
        raise NotMergeable(
            f"{type(module).__name__} does more than multiply by its weight, so no weight gives the same function"
        )
    return scale


def fan_in(site: Site) -> int:
    """Width of the flattened weight's input axis (see `apply_weight`); at a module's input, that of its channels."""
    module = site.module
    if site.port == "in":
        return site.d_in
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    return convolutions.matrix_width(module) if isinstance(module, Convolution) else site.d_in


def scale_input(module: nn.Module, w: Tensor, scale: Tensor) -> Tensor:
    """The matrix for which the module's input is multiplied by a factor per channel."""
    if not isinstance(module, Convolution):
        return w * scale
    return convolutions.scale_channels(module, w, scale)


def map_input(module: nn.Module, w: Tensor, matrix: Tensor) -> Tensor:
    """The matrix for which the module's input, channel by channel, is multiplied by this square matrix."""
    if not isinstance(module, Convolution):
        return w @ matrix
    if module.groups > 1:
        raise NotMergeable(f"a map of all input channels has no place in a convolution of {module.groups} groups")
    return torch.einsum("goik,ij->gojk", convolutions.by_channel(module, w), matrix).reshape(w.shape)


def shift_input(module: nn.Module, w: Tensor, shift: Tensor) -> Tensor:
    """What the bias gains where the module's input gains this shift per channel."""
    if not isinstance(module, Convolution):
        return w @ shift
    pads = not has_plain_forward(module) or not convolutions.sees_every_channel_everywhere(module)
    if pads and bool(shift.any()):
        raise NotMergeable("a shift of the input is no bias at the edges, which are padded with zeros or cut")
    shift = shift.unflatten(0, (module.groups, 1, -1, 1))
    return (convolutions.by_channel(module, w) * shift).sum((2, 3)).flatten()


@dataclass(eq=False)
class FrozenModule:
    """What a Delta that reads weights is given: the site's weight rows and bias, and the module as a function."""

    site: Site
    """The site of the Delta."""
    call_args: tuple[Any, ...] = field(default=(), init=False)
    """Arguments of the module's call in progress, for Deltas that replace the call."""
    call_kwargs: dict[str, Any] = field(default_factory=dict, init=False)
    """Keyword arguments of that call."""

    by_own_forward: bool = field(default=False, init=False)
    """A convolution that is linear, by a forward of its own."""

    def __post_init__(self) -> None:
        module = self.site.module
        self.by_own_forward = isinstance(module, Convolution) and own_forward.is_linear(module)

    def clear_call(self) -> None:
        """Forget the call: it is over."""
        self.call_args, self.call_kwargs = (), {}

    @property
    def weight(self) -> Tensor:
        w = weight_matrix(self.site.module, self.site.weight_name)
        index = self.site.channels_on(w.device)
        return w if index is None else w[index]

    @property
    def bias(self) -> Tensor | None:
        b = bias(self.site.module, self.site.bias_name)
        index = None if b is None else self.site.channels_on(b.device)
        return b if b is None or index is None else b[index]

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

    def apply_low_rank(self, x: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return apply_low_rank(self.site, x, a, b, y, self.by_own_forward)


def parameters_for_matrix(
    module: nn.Module, new: tuple[Tensor, Tensor | None], old: tuple[Tensor, Tensor | None]
) -> dict[str, Tensor]:
    """The parameters, by dotted name, that give a linear, convolution or embedding this weight [d_out, d_in] and bias.

    Only those that differ from the old ones. NotMergeable where the module has no place for them.
    """
    w, b = new
    values: dict[str, Tensor] = {}
    if isinstance(module, nn.Embedding):
        w, b = (w if b is None else w + b[:, None]), None
    if not torch.equal(w, old[0]):
        stored = as_stored(module, w, parametrized.weight_or_bias(module, "weight").shape)  # type: ignore[union-attr]
        values |= parametrized.parameters_for(module, "weight", stored)
    if b is not None and (old[1] is None or not torch.equal(b, old[1])):
        values |= parametrized.parameters_for(module, "bias", b)
    return values


def replace_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a module new parameters, cast to the dtype of the old ones. Names may be of its children's."""
    for name, value in values.items():
        owner, last = owner_of(module, name)
        old = owner._parameters[last]
        if old is None:
            old = next(owner.parameters())
        owner._parameters[last] = _new_parameter(value, old)


def _new_parameter(value: Tensor, old: nn.Parameter) -> nn.Parameter:
    new = value.detach().to(old.device, old.dtype).contiguous()
    if not (is_finite := new.isfinite()).all() and not (new.shape == old.shape and (is_finite | ~old.isfinite()).all()):
        raise NotMergeable(f"the merged values are more than {old.dtype} can hold")
    return nn.Parameter(new, requires_grad=False)
