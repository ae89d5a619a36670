"""How far two computations of one function are from each other, and how far rounding alone may take them.

It knows tensors, and nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the largest logit. fp32: another order of summation; half precision: weights are rounded once more by a merge.
TOLERANCE = {"float32": 1e-3, "float64": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
SMALLEST_SCALE = 1e-3  # of logits that are nearly zero


@dataclass(frozen=True)
class OutputDifference:
    """The logits of two models on one batch."""

    largest: float
    """The largest difference of two logits; infinite where one is not a number or the shapes differ."""
    scale: float
    """The largest logit."""
    effect: float
    """The largest difference that the adapters make to the base; infinite where its outputs have another shape."""
    num_same: int
    """Positions whose largest logit is the same one."""
    num_positions: int
    """Positions compared."""
    dtype: str
    """What was computed in."""

    @property
    def is_rounding(self) -> bool:
        """Whether rounding alone explains it."""
        return self.largest <= TOLERANCE[self.dtype] * max(SMALLEST_SCALE, self.scale)

    @property
    def notes(self) -> Iterator[str]:
        """A warning where rounding is as large as what the adapters do."""
        if 0 < self.effect < 2 * self.largest:
            yield (
                f"rounding in {self.dtype} is as large as what the adapters change ({self.effect:.2g}): write it in "
                "float32 (--dtype float32)"
            )

    def __str__(self) -> str:
        return f"largest difference {self.largest:.2g} in {self.dtype}, logits up to {self.scale:.3g}"

    @property
    def lines(self) -> tuple[str, ...]:
        """Everything, for a terminal."""
        effect = f"the adapters change them by up to {self.effect:.2g}; " if math.isfinite(self.effect) else ""
        return str(self), f"{effect}the largest logit is the same in {self.num_same} of {self.num_positions}"


def output_difference(expected: Tensor, found: Tensor, base: Tensor, dtype: torch.dtype) -> OutputDifference:
    """Of [positions, outputs] each. base: of the base without adapters."""
    num_same = 0 if expected.shape != found.shape else int((expected.argmax(-1) == found.argmax(-1)).sum())
    return OutputDifference(
        _largest(expected, found), float(expected.abs().max()), _largest(expected, base), num_same, len(expected),
        str(dtype).removeprefix("torch."),
    )  # fmt: skip


def _largest(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    largest = float((one - other).abs().max())
    return math.inf if math.isnan(largest) else largest
