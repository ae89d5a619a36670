"""Random changes to training images that leave their label as it is: crops, mirroring, turning, colour.

The changes are kornia's: pure PyTorch, every image of a batch drawn on its own, and it needs no torchvision. A seed
decides all of them, whatever was drawn before. It knows no label, no model and no normalisation.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kitout.data.read.tables import DataError
from kitout.errors import Errors


@dataclass(frozen=True)
class Augment:
    """crop: the smallest share of the area kept, 1 for none. turn: degrees either way. colour: 0 to 1.

    Crop and mirror are what the papers use on photographs; a digit must not be mirrored.
    """

    min_crop: float = 0.5
    horizontal_flip: bool = True
    rotate: float = 0.0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        faults = Errors(DataError, "Augment")
        for name, low, high in (("min_crop", 0.01, 1.0), ("rotate", 0.0, 180.0), ("color_jitter", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                faults.add(f"{name} is {getattr(self, name)!r}, expected {low:g} to {high:g}")
        faults.raise_if_any()
        if importlib.util.find_spec("kornia") is None:
            raise DataError("augmentation needs kornia, not installed here\n  pip install 'kitout[data]'")

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """pixels [B, 3, H, W] from 0 to 1, before normalisation; the same shape."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            changed: Tensor = self._transform_for(tuple(pixels.shape[2:]))(pixels)
        return changed.clamp(0.0, 1.0)

    def _transform_for(self, size: tuple[int, ...]) -> nn.Module:
        if size not in self._transforms:
            self._transforms[size] = self._build_transform(size)
        return self._transforms[size]

    @cached_property
    def _transforms(self) -> dict[tuple[int, ...], nn.Module]:
        return {}

    def _build_transform(self, size: tuple[int, ...]) -> nn.Module:
        import kornia.augmentation as k

        changes: list[nn.Module] = []
        if self.min_crop < 1.0:
            changes.append(k.RandomResizedCrop(size, scale=(self.min_crop, 1.0)))
        if self.horizontal_flip:
            changes.append(k.RandomHorizontalFlip())
        if self.rotate:
            changes.append(k.RandomRotation(self.rotate))
        if self.color_jitter:
            changes.append(k.ColorJiggle(self.color_jitter, self.color_jitter, self.color_jitter, 0.0))
        return nn.Sequential(*changes)
