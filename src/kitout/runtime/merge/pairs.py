"""One adapter folded into the weight and bias of a linear, a convolution or a table.

A pair is w [d_out, d_in] and b [d_out] | None in working precision. Output and input are blended by strength each on
its own, as in the forward. It knows `Delta.fold` and single adapters, and nothing of stacks, mixes or models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kitout.base import weights
from kitout.errors import NotMergeable
from kitout.runtime.modules.module_adapter import ModuleAdapter, SiteDelta

WeightBias = tuple[Tensor, Tensor | None]


def working_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def fold_adapter(module_adapter: ModuleAdapter, pair: WeightBias, start: WeightBias) -> WeightBias:
    """One adapter on what is there. start: the frozen values, for a Delta that replaces the module."""
    if module_adapter.strength == 0.0:
        return pair
    new = pair
    for part in module_adapter.on_output:
        new = part.fold(*(start if part.delta.replaces_module else new))
    pair = new = blend(pair, new, module_adapter.strength)
    for part in module_adapter.on_input:
        new = fold_in(part, new)
    return blend(pair, new, module_adapter.strength)


def fold_in(part: SiteDelta, pair: WeightBias) -> WeightBias:
    """x' = D x + t before W: W' = W D, b' = b + W t. D is diagonal where the delta is elementwise."""
    w, b = pair
    module, width = part.site.module, part.site.d_in
    if part.site.kind not in ("linear", "conv"):
        raise NotMergeable(f"{type(part.delta).__name__} acts on the input of a {part.site.kind}, not of a linear")
    if part.delta.is_scale_shift:
        scale, shift = part.delta.fold(w.new_ones(width, 1), None)
        new = weights.scale_input(module, w, scale[:, 0])
    else:
        matrix, shift = part.delta.fold(torch.eye(width, dtype=w.dtype, device=w.device), None)
        new = weights.map_input(module, w, matrix)
    if shift is not None:
        gained = weights.shift_input(module, w, shift)
        b = gained if b is None else b + gained
    return new, b


def blend(old: WeightBias, new: WeightBias, strength: float) -> WeightBias:
    """old + strength * (new - old)."""
    return new if strength == 1.0 else add_change(old, old, new, strength)


def add_change(pair: WeightBias, old: WeightBias, new: WeightBias, weight: float) -> WeightBias:
    """pair + weight * (new - old)."""
    w = pair[0] + weight * (new[0] - old[0])
    if pair[1] is None and old[1] is None and new[1] is None:
        return w, None
    zero = w.new_zeros(w.shape[0])
    b, old_b, new_b = (zero if t is None else t for t in (pair[1], old[1], new[1]))
    return w, b + weight * (new_b - old_b)
