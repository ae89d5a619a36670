"""A module's own forward with other values for its parameters, and what is found out about it by trying.

Classes with a forward of their own pad, crop, flip, scale or standardize. Whether they are linear in their weight, or
affine in all their parameters, is tried on random values and not assumed. It knows nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base import convolutions
from kitout.base.loaded_classes import transposed_linear
from kitout.errors import NotMergeable

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PLAIN_FORWARDS = (nn.Embedding.forward, *(c.forward for c in CONVOLUTIONS))
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
NORM_FORWARDS = tuple(norm.forward for norm in NORMS)
TOLERANCE, HALF_TOLERANCE = 1e-4, 3e-2  # in single precision, and below it


@contextmanager
def swapped_parameters(module: nn.Module, values: Mapping[str, Tensor | None]) -> Iterator[None]:
    """The module with other values for some of its parameters, restored afterwards. Names may be of its children's."""
    owners = {name: owner_of(module, name) for name in values}
    originals = {name: owner._parameters[last] for name, (owner, last) in owners.items()}
    try:
        for name, (owner, last) in owners.items():
            owner._parameters[last] = values[name]  # type: ignore[assignment]
        yield
    finally:
        for name, (owner, last) in owners.items():
            owner._parameters[last] = originals[name]


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a dotted parameter name leads to, and the last part of the name."""
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def unhooked_forward(module: nn.Module) -> Callable[..., Any]:
    """The frozen module's own forward, without what kitout adds to its class; it takes the module first."""
    forward: Callable[..., Any] = getattr(type(module), "frozen_forward", type(module).forward)
    return forward


def has_plain_linear_forward(module: nn.Module) -> bool:
    """Its class computes what torch's linear or transformers' transposed one computes."""
    transposed = transposed_linear()
    return unhooked_forward(module) in (nn.Linear.forward, *([transposed.forward] if transposed else []))


def has_plain_forward(module: nn.Module) -> bool:
    """A linear, an embedding or a convolution whose class has no forward of its own."""
    return has_plain_linear_forward(module) or unhooked_forward(module) in PLAIN_FORWARDS


def has_affine_forward(module: nn.Module) -> bool:
    """The same, and norms: affine in all their parameters."""
    return has_plain_forward(module) or unhooked_forward(module) in NORM_FORWARDS


@torch.no_grad()
def is_linear(module: nn.modules.conv._ConvNd) -> bool:
    """True where a convolution whose class has a forward of its own (it pads, crops, flips) is linear in its weight,
    by output and by input channel, and adds its bias at the end: tried on random values.
    """
    kernel = module._parameters.get("weight")
    if has_plain_forward(module) or kernel is None or kernel.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(kernel.device, kernel.dtype)

    w = convolutions.kernel_to_matrix(module, kernel)
    x = draw(2, module.in_channels, *convolutions.smallest_input(module))
    other, rows, columns, b = draw(*w.shape), draw(len(w)), draw(module.in_channels), draw(len(w))
    y = run_with(module, x, w).movedim(1, -1)
    pairs = [
        (run_with(module, x, w + other).movedim(1, -1), y + run_with(module, x, other).movedim(1, -1)),
        (run_with(module, x, rows[:, None] * w).movedim(1, -1), rows * y),
        (
            run_with(module, (x.movedim(1, -1) * columns).movedim(-1, 1), w),
            run_with(module, x, convolutions.scale_channels(module, w, columns)),
        ),
    ]
    if module.bias is not None:
        pairs.append((run_with(module, x, w, b).movedim(1, -1), y + b))
    tolerance = TOLERANCE if w.dtype.itemsize > 2 else HALF_TOLERANCE
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in pairs)


def run_with(module: nn.modules.conv._ConvNd, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """The module's own forward with another kernel, given as a matrix, and another bias."""
    with swapped_parameters(module, {"weight": convolutions.matrix_to_kernel(module, w), "bias": b}):
        y: Tensor = unhooked_forward(module)(module, x)
    return y


@torch.no_grad()
def check_blends(module: nn.Module, width: int, values: Mapping[str, Tensor]) -> None:
    """NotMergeable where half of these values and half of the module's own are not half of both outputs.

    width: of the module's input, where it is no convolution.
    """
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return  # what is looked up may be scaled or shifted in many ways, and it stays linear in the table
    if has_affine_forward(module) and not isinstance(module, nn.Embedding):
        return
    old = {name: module.get_parameter(name).detach() for name in values}
    new = {name: value.to(old[name].dtype) for name, value in values.items()}
    first = next(iter(old.values()))
    if isinstance(module, nn.modules.conv._ConvNd):
        size = [2, module.in_channels, *convolutions.smallest_input(module)]
    else:
        size = [2, 3, width]
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(first.device, first.dtype)
    if isinstance(module, nn.Embedding):
        x = torch.arange(min(8, module.num_embeddings), device=first.device)
        old = {name: value.clone() for name, value in old.items()}  # max_norm writes to the table
        new = {name: value.clone() for name, value in new.items()}
    outputs = []
    try:
        for each in (old, new, {name: torch.lerp(value, new[name], 0.5) for name, value in old.items()}):
            with swapped_parameters(module, each):
                outputs.append(unhooked_forward(module)(module, x))
        distance, scale = (outputs[0] + outputs[1] - 2 * outputs[2]).abs().max(), outputs[2].abs().max()
    except Exception as error:  # whatever a module does with an input that is not its own
        raise NotMergeable(
            f"a blend of two {type(module).__name__}: it could not be tried whether its parameters can hold it "
            f"({type(error).__name__}: {str(error)[:80]}); merge at strength 1"
        ) from None
    if not distance <= (TOLERANCE if first.dtype.itemsize > 2 else HALF_TOLERANCE) * scale:
        raise NotMergeable(
            f"a blend of two {type(module).__name__} is none of them: its output is not linear in its parameters; "
            "merge at strength 1 and outside of Mix"
        )
