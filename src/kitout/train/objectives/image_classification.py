"""Image classification: rows of an image set, pixels by the model's own processor.

An example is the index of an image. The call of an image model is here too: transformers returns an object with
logits, timm a tensor, and a vision transformer built for another size must be asked to interpolate its position
embeddings. It knows images and a model's call, no adapter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kitout.data.images.image_set import ImageSet
from kitout.data.images.pixels import PixelProcessor
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.objective import Batch, Losses
from kitout.train.objectives.sequence import predictions_from_logits, sequence_losses

INTERPOLATE_KWARG = "interpolate_pos_encoding"

CachedLogitsFn: TypeAlias = Callable[[Any, Sequence[int]], Tensor]  # (model, indices of images) -> logits


def image_logits(kit: Kit, pixels: Tensor, model: Any = None) -> Tensor:
    """pixels [B, 3, H, W] -> [B, classes] under the kit's active route. model: what is called; default the kit."""
    out = (model or kit)(pixels, **interpolation_kwargs(kit, pixels))
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def interpolation_kwargs(model: Any, pixels: Tensor) -> dict[str, bool]:
    """What a model or kit takes besides the pixels, if their size is not the one it was built for."""
    if INTERPOLATE_KWARG not in inspect.signature(model.forward).parameters:
        return {}
    size = model.config.image_size
    is_own_size = tuple(pixels.shape[2:]) == (tuple(size) if isinstance(size, list | tuple) else (size, size))
    return {} if is_own_size else {INTERPOLATE_KWARG: True}


class ImageClassification:
    """A class per image."""

    task: Task = "classification"
    rows: int = 1
    images: ImageSet
    """All splits together."""
    pixels: PixelProcessor
    """Turns images into pixel values, augmentation included."""
    cached_logits_fn: CachedLogitsFn | None
    """In training: the logits of images by their cached features (`trunk.image_features`); None: from pixels."""

    def __init__(self, kit: Kit, images: ImageSet, pixels: PixelProcessor) -> None:
        self.kit, self.images, self.pixels = kit, images, pixels
        self.cached_logits_fn = None

    @property
    def batch_key(self) -> Hashable:
        """By image set, since an example is an index into it; None with cached features, which are one adapter's."""
        return None if self.cached_logits_fn else (self.task, id(self.images), id(self.pixels))

    def num_tokens(self, item: int) -> int:
        return 1

    def num_targets(self, item: int) -> int:
        return 1

    def collate(self, items: Sequence[int], seeds: Sequence[int] | None) -> Batch:
        classes = torch.tensor([self.images.labels[i] for i in items], device=self.kit.device)
        inputs: dict[str, Any] = {}
        if seeds is not None and self.cached_logits_fn:
            inputs["rows"] = list(items)
        elif seeds is not None and self.pixels.augment is not None:
            # one by one, so that an image's augmentation does not depend on the others of its batch
            each = [self.pixels(self.images, [i], seed) for i, seed in zip(items, seeds, strict=True)]
            inputs["pixel_values"] = torch.cat(each).to(self.kit.device)
        else:
            inputs["pixel_values"] = self.pixels(self.images, list(items)).to(self.kit.device)
        return Batch(inputs, {"values": classes}, len(items), len(items), len(items))

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        logits = at_least_float32(self.logits(model, batch))
        return sequence_losses(self.task, logits, batch.targets["values"], weights)

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return predictions_from_logits(self.task, self.logits(model, batch).float())

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """[B, C]."""
        if "rows" in batch.inputs:
            assert self.cached_logits_fn is not None
            return self.cached_logits_fn(model, batch.inputs["rows"])
        return image_logits(self.kit, batch.inputs["pixel_values"], model)
