"""From images to the pixels a model takes: its own image processor, at its own size or another, and augmentation.

The PIL backend is requested by name, so the same file gives the same numbers with and without torchvision.
It knows how a processor writes its sizes, and nothing of labels, kits or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitout.data.images.augment import Augment
from kitout.data.images.image_set import ImageSet
from kitout.data.read.tables import DataError


class PixelProcessor:
    """`processor(images, indices)` -> [len(indices), 3, H, W].

    size: of the square the model sees; None: the processor's own. channels: that the model reads, 3 or 1 (gray).
    """

    def __init__(
        self, processor: Any, size: int | None = None, augment: Augment | None = None, channels: int = 3
    ) -> None:
        self.processor, self.size, self.augment, self.channels = processor, size, augment, channels

    @classmethod
    def from_pretrained(
        cls, model: str | Path, size: int | None = None, augment: Augment | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> PixelProcessor:  # fmt: skip
        """The processor of a model folder or name; size must be a multiple of the model's patches.

        settings: of the processor, in place of the model's.
        """
        from transformers import AutoConfig, AutoImageProcessor
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would warn that there is no torchvision, which is not needed
        try:
            processor = AutoImageProcessor.from_pretrained(model, backend="pil")
            config = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise DataError(f"{model} has no image processor that loads: {str(error)[:300]}") from error
        finally:
            logging.set_verbosity(verbosity)
        if size is not None:
            check_size(size, getattr(config, "patch_size", 1))
        if settings is not None:
            processor = type(processor)(**settings)
        return cls(processor, size, augment, getattr(config, "num_channels", 3))

    def __call__(self, images: ImageSet, rows: Sequence[int], seed: int | None = None) -> Tensor:
        """The pixels of the images of these indices. seed: of the augmentation; None: without it."""
        opened = [images.open(i) for i in rows]
        if seed is None or self.augment is None:
            return self._process(opened)
        pixels = self.augment(self._process(opened, do_normalize=False), seed)  # colors change before normalization
        if not getattr(self.processor, "do_normalize", False):
            return pixels
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.processor.image_mean, self.processor.image_std))
        return (pixels - mean) / std

    def standalone(self) -> Any:
        """An image processor of transformers that does by itself what this one does for images in RGB."""
        settings = {k: v for k, v in self.processor.to_dict().items() if k not in ("image_processor_type", "backend")}
        return type(self.processor)(**{**settings, **self._size_options()})

    def _process(self, images: Sequence[Any], **options: Any) -> Tensor:
        if self.channels == 1:
            images = [image.convert("L") for image in images]
        try:
            batch = self.processor(list(images), return_tensors="pt", **self._size_options(), **options)
        except ValueError as error:
            if self.size is not None or len({image.size for image in images}) == 1:
                raise
            raise DataError(
                f"this processor leaves images at different sizes; set one, data.image_size=224: {error}"
            ) from error
        pixels: Tensor = batch["pixel_values"]
        if pixels.ndim != 4:
            others = ", ".join(name for name in batch if name != "pixel_values")
            raise DataError(
                f"{type(self.processor).__name__} gives {list(pixels.shape[1:])} numbers per image and {others}, not "
                "channels, height and width: models that read images so cannot be trained here; choose another"
            )
        return pixels

    def _size_options(self) -> dict[str, Any]:
        """The short side becomes `size` and the center is cropped, or both sides do if the processor does not crop."""
        if self.size is None:
            return {}
        square = {"height": self.size, "width": self.size}
        if "shortest_edge" in (self.processor.size or {}):
            return {"size": {"shortest_edge": self.size}, "do_center_crop": True, "crop_size": square}
        does_crop = getattr(self.processor, "do_center_crop", None)
        return {"size": square} | ({"crop_size": square} if does_crop else {})


def check_size(size: int, patch_size: Any) -> None:
    """DataError if the square is not a multiple of the patches (a number, or height and width)."""
    sides = {int(side) for side in (patch_size if isinstance(patch_size, list | tuple) else [patch_size or 1])}
    for side in sides:
        if size < side or size % side:
            below, above = size // side * side, (size // side + 1) * side
            nearest = " or ".join(str(s) for s in (below, above) if s)
            raise DataError(f"size {size} is not a multiple of this model's patches of {side}: use {nearest}")
