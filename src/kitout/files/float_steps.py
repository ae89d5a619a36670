"""A trained copy of a frozen tensor kept as its difference, so that a file holds no base weights and loses no bit.

Subtracting floats loses bits (1e-10 - 1 is -1), so the difference is counted in steps from one representable number to
the next: an integer per value, zero where training changed nothing, exact on the same base. On a copy of that base in
another precision, the same steps from the rounded start end within the same relative rounding. It knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # bytes of a float -> the integer that counts its steps


def steps_of(dtype: torch.dtype) -> torch.dtype:
    """The integer type that a difference of this floating-point type is kept in."""
    return STEPS[dtype.itemsize]


def to_steps(trained: Tensor, base: Tensor) -> Tensor:
    """Number of representable numbers from the start to the trained value, with sign; wraps around as integers do."""
    start = base.detach().to(trained.device, trained.dtype)
    return _order(trained.detach()) - _order(start)


def from_steps(steps: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """The trained values: `steps` representable numbers from the start."""
    order = _order(base.detach().to(steps.device, dtype)) + steps
    return _flip(order).view(dtype)


def _order(value: Tensor) -> Tensor:
    """The floats' bits as integers in the order of their values: -0.0 is -1, 0.0 is 0."""
    return _flip(value.contiguous().view(steps_of(value.dtype)))


def _flip(bits: Tensor) -> Tensor:
    """Reverses the order of negative floats, whose bits grow as their values fall. Its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
