"""Augmentation: random changes to training images that keep their label, such as crops, flips, rotation and color.

The changes are kornia's: pure PyTorch, random for every image of a batch, without torchvision. A seed decides all of
them, whatever random numbers were drawn before. It knows no label, no model and no normalization.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kitout.data.read.tables import DataError
from kitout.errors import Errors
from kitout.install_hint import suggest_install


@dataclass(frozen=True)
class Augment:
    """The deerrors are what the papers use on photographs; a digit must not be flipped."""

    min_crop: float = 0.5
    """Smallest fraction of the area that a random crop keeps; 1 for no crop."""
    horizontal_flip: bool = True
    """Flip every second image on average."""
    rotate: float = 0.0
    """Rotate by up to so many degrees either way."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation by up to this fraction."""

    def __post_init__(self) -> None:
        errors = Errors(DataError, "Augment")
        for name, low, high in (("min_crop", 0.01, 1.0), ("rotate", 0.0, 180.0), ("color_jitter", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                errors.add(f"{name} is {getattr(self, name)!r}, expected {low:g} to {high:g}")
        errors.raise_if_any()
        if importlib.util.find_spec("kornia") is None:
            raise DataError(f"augmentation needs kornia, not installed here\n  {suggest_install(extra='data')}")

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """pixels [B, 3, H, W] from 0 to 1, before normalization; the same shape."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs, for good
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

        transforms: list[nn.Module] = []
        if self.min_crop < 1.0:
            transforms.append(k.RandomResizedCrop(size, scale=(self.min_crop, 1.0)))
        if self.horizontal_flip:
            transforms.append(k.RandomHorizontalFlip())
        if self.rotate:
            transforms.append(k.RandomRotation(self.rotate))
        if self.color_jitter:
            transforms.append(k.ColorJiggle(self.color_jitter, self.color_jitter, self.color_jitter, 0.0))
        return nn.Sequential(*transforms)
