"""A labeled set of images: files opened on demand, or one array; checked as a whole before training.

Every image is opened once while the set is built. All that do not open are reported together with the reason, and the
hash of the pixels later tells which images are the same. It knows no folder layout, no table and no model, and makes no
split.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kitout.data.read.row_sample import RowSample
from kitout.data.read.tables import DataError, add_first
from kitout.errors import BadRows, Errors, suggest
from kitout.install_hint import suggest_install

try:
    from PIL import Image as Image  # others take it from here, behind the message below
    from PIL import ImageOps as ImageOps
    from PIL import UnidentifiedImageError
except ImportError as error:
    raise DataError(f"images need pillow, not installed here\n  {suggest_install(extra='data')}") from error

# Formats that only decode pixels: no EPS, which starts Ghostscript, and no container of commands.
IMAGE_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm"),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)

PixelArray: TypeAlias = NDArray[np.uint8]
ImageSource: TypeAlias = Path | bytes | PixelArray


@dataclass(frozen=True)
class ImageRecord:
    """One image as a reader finds it."""

    source: ImageSource
    """Its file, what is in the file, or its pixels."""
    label: str
    """The name of its class."""
    split: str = ""
    """train, validation or test; "" if the set names none."""
    location: str = ""
    """Where it was read, as the start of a message."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and what is known of each; `open(i)` gives an RGB image."""

    sources: tuple[ImageSource, ...]
    """The file, its content or the pixels of each image."""
    labels: tuple[int, ...]
    """The class of each image, an index into label_names."""
    label_names: tuple[str, ...]
    """The classes, in order."""
    splits: tuple[str, ...]
    """The split of each image: train, validation or test; "" if the set names none."""
    hashes: tuple[str, ...]
    """Of the pixels of each image."""

    def __len__(self) -> int:
        return len(self.sources)

    def open(self, index: int) -> Image.Image:
        return open_image(self.sources[index])

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """These images, in this order, with the same classes."""
        fields = ("sources", "labels", "splits", "hashes")
        return replace(self, **{f: tuple(getattr(self, f)[i] for i in indices) for f in fields})

    def concat(self, others: Sequence[ImageSet]) -> ImageSet:
        """These images and then those of the others, which have the same classes."""
        fields = ("sources", "labels", "splits", "hashes")
        return replace(
            self, **{f: tuple(value for images in (self, *others) for value in getattr(images, f)) for f in fields}
        )

    @property
    def digest(self) -> str:
        """A fingerprint of pixels, labels and splits in their order; file names do not count."""
        sha256 = hashlib.sha256(repr(self.label_names).encode())
        for row in zip(self.hashes, self.labels, self.splits, strict=True):
            sha256.update(repr(row).encode())
        return sha256.hexdigest()


def build_image_set(
    records: Sequence[ImageRecord], label_names: Sequence[str] | None, description: str,
    skipped: list[str] | None = None, sample: RowSample | None = None, to_train: bool = True,
) -> ImageSet:  # fmt: skip
    """The set of what a reader finds. label_names: all classes, in order; default: those of the records, sorted.

    description: the set in a few words, for messages. Raises DataError with all errors at once: images that do not
    open, labels that are empty or unknown, too few images or classes. skipped: gets a message for every image that does
    not open, which is left out; None: they are errors. sample: draws those that are opened, as it takes long.
    to_train: False: for measuring any number of images and classes will do.
    """
    errors = Errors(DataError, description)
    names = list(label_names) if label_names is not None else sorted({r.label for r in records if r.label})
    set_errors = _find_set_errors(records, names, to_train) if sample is not None else None
    if sample is not None:
        records = sample.draw(records)
    hashes, unreadable = {}, []
    for i, record in enumerate(records):
        try:
            hashes[i] = hash_pixels(open_image(record.source))
        except DataError as error:
            unreadable.append(f"{record.location}{error}")
    if skipped is not None:
        skipped += unreadable
        records = [records[i] for i in hashes]
    else:
        add_first(errors, unreadable, "images")
        if unreadable:
            errors.error = BadRows
    add_first(errors, [f"{r.location}the label is empty" for r in records if not r.label], "rows")
    unknown = [r for r in records if r.label and r.label not in names]
    messages = [f"{r.location}label {r.label!r} is not one of the given; {suggest(r.label, names)}" for r in unknown]
    add_first(errors, messages, "labels")
    for message in _find_set_errors(records, names, to_train) if set_errors is None else set_errors:
        errors.add(message)
    errors.raise_if_any()
    return ImageSet(
        tuple(r.source for r in records),
        tuple(names.index(r.label) for r in records),
        tuple(names),
        tuple(r.split for r in records),
        tuple(hashes.values()),
    )


def _find_set_errors(records: Sequence[ImageRecord], label_names: Sequence[str], to_train: bool) -> list[str]:
    """Why the set as a whole cannot be classified."""
    messages = []
    if not records:
        return ["it has no images"]
    if not to_train:
        return []
    if len(set(label_names)) < len(label_names):
        messages.append(f"the given labels repeat: {', '.join(label_names)}; name each once")
    if len(label_names) < 2:
        messages.append(f"all images have one label ({', '.join(label_names)}): at least 2 classes are needed")
    elif len(records) < 2 * len(label_names):
        messages.append(
            f"{len(records)} images for {len(label_names)} classes: at least two of each are needed; is it the "
            "right column?"
        )
    trained = {r.label for r in records if r.split == "train"}
    untrained = {r.label: r.split for r in records if r.split not in ("", "train") and r.label not in trained}
    messages += [f"class {label!r} is in {split} and not in train" for label, split in sorted(untrained.items())]
    return messages


def open_image(source: ImageSource) -> Image.Image:
    """The image in RGB, rotated as its EXIF says. Raises DataError with the reason."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    name = "it" if isinstance(source, bytes) else str(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=list(IMAGE_FORMATS)) as image:
                return to_rgb(name, ImageOps.exif_transpose(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(
                f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller, "
                "or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
            ) from error
        except FileNotFoundError as error:
            raise DataError(f"there is no file {name}") from error
        except UnidentifiedImageError as error:
            raise DataError(f"{name} is not an image that can be read ({', '.join(IMAGE_FORMATS)})") from error
        except (OSError, ValueError, SyntaxError, EOFError) as error:  # PIL raises any of them for damaged files
            raise DataError(f"{name} does not open: {str(error)[:120]}") from error


def to_rgb(name: str, image: Image.Image) -> Image.Image:
    """8 bits of red, green and blue; transparent pixels are white. name: for messages."""
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{name} has {image.mode} pixels, whose white is unknown: save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, "white")  # transparent pixels count as white, not as their hidden colors
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")


def hash_pixels(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
