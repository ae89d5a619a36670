"""Images to classes, in the one loop: rows of a set of images, pixels by the model's own processor.

An item is a row's number. It knows images and a model's call (`kitout.train.forward`), no adapter;
`kitout.train.images` is the demo's own loop, which keeps the frozen trunk's features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kitout.data.images.image_set import Images
from kitout.data.images.pixels import Pixels
from kitout.evaluate.metrics.registry import Task
from kitout.kit import Kit
from kitout.train.forward import logits
from kitout.train.objectives.batch import Batch
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.objective import Losses
from kitout.train.objectives.sequence import read_off, value_losses


class Pictures:
    """images: all parts together; an item is an index. Augmentation, if any, is the pixels' own."""

    task: Task = "classification"

    def __init__(self, kit: Kit, images: Images, pixels: Pixels) -> None:
        self.kit, self.images, self.pixels = kit, images, pixels

    @property
    def form(self) -> Hashable:
        """Its items are rows of its own images."""
        return self.task, id(self.images), id(self.pixels)

    def size(self, item: int) -> int:
        return 1

    def terms(self, item: int) -> int:
        return 1

    def collate(self, items: Sequence[int], seeds: Sequence[int] | None) -> Batch:
        if seeds is None or self.pixels.augment is None:
            pixels = self.pixels(self.images, list(items))
        else:  # one by one, so that an image's changes do not depend on who shares its batch
            pixels = torch.cat([self.pixels(self.images, [i], seed) for i, seed in zip(items, seeds, strict=True)])
        pixels = pixels.to(self.kit.device)
        gold = torch.tensor([self.images.labels[i] for i in items], device=self.kit.device)
        return Batch({"pixel_values": pixels}, {"values": gold}, len(items), len(items), len(items))

    def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
        found = at_least_float32(logits(self.kit, batch.inputs["pixel_values"], model))
        return value_losses(self.task, found, batch.gold["values"], weights)

    @torch.no_grad()
    def predictions(self, model: Any, batch: Batch) -> list[Any]:
        return read_off(self.task, logits(self.kit, batch.inputs["pixel_values"], model).float())
