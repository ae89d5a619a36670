"""A labelled set of images: files opened when asked for, or one array; checked whole before anything is learnt.

Every image is opened once while the set is made: what does not open is told with its reason, all at once, and the hash
of its pixels says later which images are the same. It knows no folder layout, no table, no model and no split.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kitout.data.read.tables import DataError, add_first
from kitout.errors import Errors, suggest

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as missing:
    raise DataError("images need pillow, not installed here\n  pip install 'kitout[data]'") from missing

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
IMAGE_SUFFIXES = tuple(ending for endings in IMAGE_FORMATS.values() for ending in endings)

PixelArray: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageRecord:
    """One image as a reader found it: where, what it is called, in which part, and the words that lead to it."""

    source: Path | PixelArray
    label: str
    split: str = ""
    location: str = ""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Sources and what is known of each; `open(i)` gives an RGB picture.

    labels: indices into names. parts: "train", "validation", "test" or "" where the set says nothing. hashes: of
    the pixels.
    """

    sources: tuple[Path | PixelArray, ...]
    labels: tuple[int, ...]
    label_names: tuple[str, ...]
    splits: tuple[str, ...]
    hashes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def open(self, index: int) -> Image.Image:
        return open_image(self.sources[index])

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """These images, in this order, with the same names."""
        fields = ("sources", "labels", "splits", "hashes")
        return replace(self, **{f: tuple(getattr(self, f)[i] for i in indices) for f in fields})

    def concat(self, others: Sequence[ImageSet]) -> ImageSet:
        """These images and then those of the others, which have the same names."""
        fields = ("sources", "labels", "splits", "hashes")
        return replace(self, **{f: tuple(v for one in (self, *others) for v in getattr(one, f)) for f in fields})

    @property
    def digest(self) -> str:
        """A fingerprint of pixels, labels and parts in their order; file names do not count."""
        seen = hashlib.sha256(repr(self.label_names).encode())
        for row in zip(self.hashes, self.labels, self.splits, strict=True):
            seen.update(repr(row).encode())
        return seen.hexdigest()


def build_image_set(records: Sequence[ImageRecord], label_names: Sequence[str] | None, description: str) -> ImageSet:
    """The set of what a reader found. names: the labels there may be, in order; default: those found, sorted.

    Raises DataError with every fault at once: images that do not open, labels that are empty or unknown, too few
    images or classes. what: the set in a few words, for the message.
    """
    faults = Errors(DataError, description)
    known = list(label_names) if label_names is not None else sorted({f.label for f in records if f.label})
    hashes, unreadable = [], []
    for item in records:
        try:
            hashes.append(hash_pixels(open_image(item.source)))
        except DataError as wrong:
            unreadable.append(f"{item.location}{wrong}")
    add_first(faults, unreadable, "images")
    add_first(faults, [f"{f.location}the label is empty" for f in records if not f.label], "rows")
    strangers = [f for f in records if f.label and f.label not in known]
    add_first(
        faults,
        [f"{f.location}label {f.label!r} is none of the given; {suggest(f.label, known)}" for f in strangers],
        "labels",
    )
    for fault in _find_set_errors(records, known):
        faults.add(fault)
    faults.raise_if_any()
    return ImageSet(
        tuple(f.source for f in records),
        tuple(known.index(f.label) for f in records),
        tuple(known),
        tuple(f.split for f in records),
        tuple(hashes),
    )


def _find_set_errors(records: Sequence[ImageRecord], label_names: Sequence[str]) -> list[str]:
    """What makes the set as a whole no classification."""
    faults = []
    if not records:
        return ["it holds no images"]
    if len(set(label_names)) < len(label_names):
        faults.append(f"the given labels repeat: {', '.join(label_names)}; name each once")
    if len(label_names) < 2:
        faults.append(f"all images have one label ({', '.join(label_names)}): at least 2 classes are needed")
    elif len(records) < 2 * len(label_names):
        faults.append(
            f"{len(records)} images for {len(label_names)} classes: at least two of each are needed; is it the "
            "right column?"
        )
    taught = {f.label for f in records if f.split == "train"}
    unseen = {f.label: f.split for f in records if f.split not in ("", "train") and f.label not in taught}
    faults += [f"class {label!r} is in {part} and not in train" for label, part in sorted(unseen.items())]
    return faults


def open_image(source: Path | PixelArray) -> Image.Image:
    """An RGB picture, turned as its EXIF says. Raises DataError with the reason."""
    if not isinstance(source, Path):
        return Image.fromarray(source).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(source, formats=list(IMAGE_FORMATS)) as image:
                return _to_rgb(source, ImageOps.exif_transpose(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as bomb:
            raise DataError(
                f"{source} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller, "
                "or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
            ) from bomb
        except FileNotFoundError as wrong:
            raise DataError(f"there is no file {source}") from wrong
        except UnidentifiedImageError as wrong:
            raise DataError(f"{source} is no image that can be read ({', '.join(IMAGE_FORMATS)})") from wrong
        except (OSError, ValueError, SyntaxError, EOFError) as wrong:  # PIL's words for damaged files of many kinds
            raise DataError(f"{source} does not open: {str(wrong)[:120]}") from wrong


def _to_rgb(source: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{source} has {image.mode} pixels, whose white is unknown: save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        seen = image.convert("RGBA")
        ground = Image.new("RGBA", seen.size, "white")  # what is seen through counts as paper, not as hidden colours
        return Image.alpha_composite(ground, seen).convert("RGB")
    return image.convert("RGB")


def hash_pixels(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
