"""A tiny vision model with its processor, and images it can learn in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import transformers

import kitout
from kitout import Kit
from kitout.data.images.image_set import ImageSet
from kitout.data.images.pixels import PixelProcessor
from kitout.data.read.image_folders import from_arrays
from zoo import IMAGE, ZOO

CLASSES = 5  # of the zoo's heads
PROCESSOR = transformers.ViTImageProcessorPil(
    size={"height": IMAGE, "width": IMAGE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
)


def pixels(**settings: object) -> PixelProcessor:
    return PixelProcessor(PROCESSOR, **settings)  # type: ignore[arg-type]


def images(each: int = 8, seed: int = 0) -> ImageSet:
    """A bright bar at one of five heights, with noise."""
    noise = np.random.default_rng(seed).random((CLASSES * each, IMAGE, IMAGE)) * 0.3
    labels = np.arange(CLASSES * each) % CLASSES
    for picture, label in zip(noise, labels, strict=True):
        picture[6 * label : 6 * label + 6] += 0.7
    return from_arrays(noise, labels)


def kit(species: str = "dinov2") -> Kit:
    return kitout.attach(ZOO[species].build())


def folder(path: Path, species: str = "dinov2") -> Path:
    ZOO[species].build().save_pretrained(path)
    PROCESSOR.save_pretrained(path)
    return path
