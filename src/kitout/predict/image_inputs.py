"""Inputs of an image task: paths, files in memory, PIL images or arrays, as a set that the model's processor reads.

Every image is opened once before anything is computed, and all that do not open are named together. It knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from kitout.data.images.image_set import Image, ImageOps, ImageSet, ImageSource, open_image, to_rgb
from kitout.data.images.pixels import PixelProcessor
from kitout.data.read.tables import DataError
from kitout.files.usage_record import ImagesRecord
from kitout.format import short_repr
from kitout.predict.text_inputs import raise_bad_inputs


def image_sources(inputs: Sequence[Any]) -> list[ImageSource]:
    """What an ImageSet opens, one per input. DataError names every input that is no image."""
    sources: list[ImageSource] = []
    refused: dict[int, str] = {}
    for index, value in enumerate(inputs):
        try:
            sources.append(_source(value))
            open_image(sources[-1])
        except DataError as error:
            refused[index] = f"input {index + 1}: {error}"
    raise_bad_inputs(refused)
    return sources


def image_set(sources: Sequence[ImageSource]) -> ImageSet:
    """The set of these images; their class is not known."""
    n = len(sources)
    return ImageSet(tuple(sources), (0,) * n, ("",), ("",) * n, ("",) * n)


def pixel_processor(base: str, record: ImagesRecord | None) -> PixelProcessor:
    """The base's image processor with the settings that the training images went through."""
    if record is None:
        return PixelProcessor.from_pretrained(base)
    return PixelProcessor.from_pretrained(base, record.size, settings=record.processor)


def _source(value: Any) -> ImageSource:
    if isinstance(value, str | PathLike):
        path = Path(value).expanduser()
        if path.is_dir():
            raise DataError(f"{path} is a folder: give the images in it, sorted(Path({str(path)!r}).iterdir())")
        return path
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image):
        return np.asarray(to_rgb("it", ImageOps.exif_transpose(value)))
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            raise DataError(f"an array of {value.dtype} {list(value.shape)}; expected bytes, [H, W] or [H, W, 3]")
        return value
    raise DataError(f"found {short_repr(value)}, expected a path, a PIL image, an array or the bytes of a file")
