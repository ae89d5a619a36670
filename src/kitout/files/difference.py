"""A trained copy of a frozen tensor kept as its difference, so that a file holds no base weights and loses no bit.

The stored difference is the plain subtraction. Where adding it back does not give the trained bits (a value much
smaller than the one it started from), those few places are stored beside it as they are. On another copy of the same
base (bf16 for fp32) the sum is what the difference means. It knows tensors only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kitout.errors import FileError

AT, VALUE = "~at", "~is"  # flat positions that subtraction loses, and what is there


def taken(name: str, trained: Tensor, base: Tensor) -> dict[str, Tensor]:
    """What a file keeps of one trained copy."""
    start = base.detach().to(trained.device, trained.dtype)
    difference = trained.detach() - start
    lost = (_bits(start + difference) != _bits(trained.detach())).flatten().nonzero()[:, 0]
    kept = {name: difference}
    if len(lost):
        kept |= {name + AT: lost, name + VALUE: trained.detach().flatten()[lost]}
    return kept


def given_back(name: str, stored: dict[str, Tensor], base: Tensor) -> Tensor:
    """The trained copy; raises FileError where the places beside the difference make no sense."""
    difference = stored[name]
    whole = base.detach().to(difference.device, difference.dtype) + difference
    at, value = stored.get(name + AT), stored.get(name + VALUE)
    if at is None or value is None:
        return whole
    if bool((at < 0).any()) or bool((at >= whole.numel()).any()):
        raise FileError(f"tensor {name + AT!r} points outside {name!r}, which has {whole.numel():,} values")
    flat = whole.flatten()
    flat[at] = value
    return flat.view(whole.shape)


def companions(
    copied: Iterable[str], found: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """`found` without the places beside differences, where these are in order; others stay in, as strangers."""
    rest = dict(found)
    for name in copied:
        at, value = found.get(name + AT), found.get(name + VALUE)
        fits = name in found and at and value and at == (torch.int64, value[1]) and value[0] == found[name][0]
        if fits and value and len(value[1]) == 1:
            del rest[name + AT], rest[name + VALUE]
    return rest


def _bits(tensor: Tensor) -> Tensor:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(whole[tensor.dtype.itemsize])
