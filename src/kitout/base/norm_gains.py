"""The gains of norms, stored as g or as 1 + g: which of the two is measured, and what is folded into them.

A norm takes a scale per channel and, where it has or can hold a bias, a shift. It knows norms by what they compute, in
whatever layout they take, and nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kitout.base.own_forward import has_affine_forward, swapped_parameters, unhooked_forward
from kitout.errors import NotMergeable


def norm_gain_offset(module: nn.Module) -> float:
    """0.0 where a norm multiplies by its weight, 1.0 where by 1 + weight: measured, not assumed. torch's own multiply.

    Raises NotMergeable where neither fits, or where the norm is not an elementwise gain at all.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1:
        raise NotMergeable(f"{type(module).__name__} has no 1-D gain to merge into")
    if has_affine_forward(module):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.numel(), generator=generator).to(weight.device, torch.float32)
    layout = _norm_layout(module, x)
    parameters = {n: p.detach().float() for n, p in module.named_parameters()}
    shift = parameters["bias"] if "bias" in parameters else torch.zeros_like(x[0])

    def run_with_gain(gain: Tensor) -> Tensor:
        with swapped_parameters(module, {**parameters, "weight": gain}):
            y: Tensor = unhooked_forward(module)(module, x.view(layout))
            return y.view(x.shape) - shift

    zero, one = run_with_gain(torch.zeros_like(x[0])), run_with_gain(torch.ones_like(x[0]))
    normalized = one - zero  # in both conventions
    for offset in (0.0, 1.0):
        if torch.allclose(zero, offset * normalized, atol=1e-5):
            return offset
    raise NotMergeable(f"{type(module).__name__} is neither gain * norm(x) nor (1 + gain) * norm(x)")


def _norm_layout(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape in which the norm takes rows [n, d]: some classes want channels first, with positions after them."""
    for positions in range(3):
        layout = (*x.shape, *(1,) * positions)
        try:
            if (
                unhooked_forward(module)(module, x.to(module.get_parameter("weight").dtype).view(layout)).shape
                == layout
            ):
                return layout
        except TypeError as error:  # a gate, a condition: what it multiplies by is not its gain alone
            raise NotMergeable(f"{type(module).__name__} takes more than its input: {str(error)[:120]}") from None
        except (RuntimeError, IndexError, ValueError):
            continue
    raise NotMergeable(f"{type(module).__name__} takes its values in a layout of its own")


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
