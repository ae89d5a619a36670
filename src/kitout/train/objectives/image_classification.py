"""Images to classes, in the one loop: rows of a set of images, pixels by the model's own processor.

An item is a row's number. One call of a model is here too: transformers returns an object with logits, timm a tensor;
a vision transformer built for another size has to be asked to interpolate its positions. It knows images and a model's
call, no adapter.
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

CachedLogitsFn: TypeAlias = Callable[[Any, Sequence[int]], Tensor]  # (model, rows of the set) -> logits


def image_logits(kit: Kit, pixels: Tensor, model: Any = None) -> Tensor:
    """pixels [B, 3, H, W] -> [B, classes] under the kit's active route. model: who is called; default the kit."""
    out = (model or kit)(pixels, **interpolation_kwargs(kit, pixels))
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def interpolation_kwargs(model: Any, pixels: Tensor) -> dict[str, bool]:
    """What a model (or a kit) is told besides the pixels, whose size may not be the one it was built for."""
    if INTERPOLATE_KWARG not in inspect.signature(model.forward).parameters:
        return {}
    built = model.config.image_size
    same = tuple(pixels.shape[2:]) == (tuple(built) if isinstance(built, list | tuple) else (built, built))
    return {} if same else {INTERPOLATE_KWARG: True}


class ImageClassification:
    """images: all parts together; an item is an index. Augmentation, if any, is the pixels' own.

    from_rows: how training finds the logits of rows without their pixels (`loop.frozen_trunk`); None: it does not.
    """

    task: Task = "classification"

    def __init__(self, kit: Kit, images: ImageSet, pixels: PixelProcessor) -> None:
        self.kit, self.images, self.pixels = kit, images, pixels
        self.cached_logits_fn: CachedLogitsFn | None = None

    @property
    def batch_key(self) -> Hashable:
        """Its items are rows of its own images; kept features belong to one adapter."""
        return None if self.cached_logits_fn else (self.task, id(self.images), id(self.pixels))

    def num_tokens(self, item: int) -> int:
        return 1

    def num_targets(self, item: int) -> int:
        return 1

    def collate(self, items: Sequence[int], seeds: Sequence[int] | None) -> Batch:
        gold = torch.tensor([self.images.labels[i] for i in items], device=self.kit.device)
        inputs: dict[str, Any] = {}
        if seeds is not None and self.cached_logits_fn:
            inputs["rows"] = list(items)
        elif seeds is not None and self.pixels.augment is not None:
            # one by one, so that an image's changes do not depend on who shares its batch
            each = [self.pixels(self.images, [i], seed) for i, seed in zip(items, seeds, strict=True)]
            inputs["pixel_values"] = torch.cat(each).to(self.kit.device)
        else:
            inputs["pixel_values"] = self.pixels(self.images, list(items)).to(self.kit.device)
        return Batch(inputs, {"values": gold}, len(items), len(items), len(items))

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        found = at_least_float32(self._logits(model, batch))
        return sequence_losses(self.task, found, batch.targets["values"], weights)

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return predictions_from_logits(self.task, self._logits(model, batch).float())

    def _logits(self, model: Any, batch: Batch) -> Tensor:
        if "rows" in batch.inputs:
            assert self.cached_logits_fn is not None
            return self.cached_logits_fn(model, batch.inputs["rows"])
        return image_logits(self.kit, batch.inputs["pixel_values"], model)
