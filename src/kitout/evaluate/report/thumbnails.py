"""Test images of a classifier as small pictures for the report, with what was predicted.

Which ones are shown follows from a rule (`class_plots.in_turn`): the first of each class in turn. They need pillow,
which images need anyway, and no matplotlib. It knows images and names, no model and no page.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIDE = 112  # pixels of a thumbnail, at most
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Thumbnail:
    """One image."""

    jpeg: bytes
    """The image, made smaller."""
    true: str
    """Its class."""
    predicted: str
    """The class that was predicted."""


@dataclass(frozen=True)
class PredictedImages:
    """Test images of one adapter: all of them, or the misclassified ones."""

    images: Sequence[Any]
    """Those that are shown, as pillow has them."""
    true: Sequence[str]
    """The class of each."""
    predicted: Sequence[str]
    """The predicted class of each."""
    total: int
    """How many there are in all."""

    @property
    def thumbnails(self) -> list[Thumbnail]:
        rows = zip(self.images, self.true, self.predicted, strict=True)
        return [Thumbnail(_to_jpeg(image), true, predicted) for image, true, predicted in rows]


def _to_jpeg(image: Any) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
