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

from kitout.data.read.tables import DataError, told
from kitout.errors import Faults, suggest

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as missing:
    raise DataError("images need pillow, not installed here\n  pip install 'kitout[data]'") from missing

# Formats that only decode pixels: no EPS, which starts Ghostscript, and no container of commands.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm"),
}
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)

Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """One image as a reader found it: where, what it is called, in which part, and the words that lead to it."""

    source: Path | Bytes
    label: str
    part: str = ""
    place: str = ""


@dataclass(frozen=True, eq=False)
class Images:
    """Sources and what is known of each; `open(i)` gives an RGB picture.

    labels: indices into names. parts: "train", "validation", "test" or "" where the set says nothing. hashes: of
    the pixels.
    """

    sources: tuple[Path | Bytes, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    parts: tuple[str, ...]
    hashes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def open(self, index: int) -> Image.Image:
        return opened(self.sources[index])

    def pick(self, chosen: Sequence[int]) -> Images:
        """These images, in this order, with the same names."""
        fields = ("sources", "labels", "parts", "hashes")
        return replace(self, **{f: tuple(getattr(self, f)[i] for i in chosen) for f in fields})

    def joined(self, others: Sequence[Images]) -> Images:
        """These images and then those of the others, which have the same names."""
        fields = ("sources", "labels", "parts", "hashes")
        return replace(self, **{f: tuple(v for one in (self, *others) for v in getattr(one, f)) for f in fields})

    @property
    def digest(self) -> str:
        """A fingerprint of pixels, labels and parts in their order; file names do not count."""
        seen = hashlib.sha256(repr(self.names).encode())
        for row in zip(self.hashes, self.labels, self.parts, strict=True):
            seen.update(repr(row).encode())
        return seen.hexdigest()


def gather(found: Sequence[Found], names: Sequence[str] | None, what: str) -> Images:
    """The set of what a reader found. names: the labels there may be, in order; default: those found, sorted.

    Raises DataError with every fault at once: images that do not open, labels that are empty or unknown, too few
    images or classes. what: the set in a few words, for the message.
    """
    faults = Faults(DataError, what)
    known = list(names) if names is not None else sorted({f.label for f in found if f.label})
    hashes, unreadable = [], []
    for item in found:
        try:
            hashes.append(pixel_hash(opened(item.source)))
        except DataError as wrong:
            unreadable.append(f"{item.place}{wrong}")
    told(faults, unreadable, "images")
    told(faults, [f"{f.place}the label is empty" for f in found if not f.label], "rows")
    strangers = [f for f in found if f.label and f.label not in known]
    told(faults, [f"{f.place}label {f.label!r} is none of the given; {suggest(f.label, known)}" for f in strangers],
         "labels")  # fmt: skip
    for fault in _misfits(found, known):
        faults.add(fault)
    faults.raise_if_any()
    return Images(
        tuple(f.source for f in found),
        tuple(known.index(f.label) for f in found),
        tuple(known),
        tuple(f.part for f in found),
        tuple(hashes),
    )


def _misfits(found: Sequence[Found], known: Sequence[str]) -> list[str]:
    """What makes the set as a whole no classification."""
    faults = []
    if not found:
        return ["it holds no images"]
    if len(set(known)) < len(known):
        faults.append(f"the given labels repeat: {', '.join(known)}; name each once")
    if len(known) < 2:
        faults.append(f"all images have one label ({', '.join(known)}): at least 2 classes are needed")
    elif len(found) < 2 * len(known):
        faults.append(
            f"{len(found)} images for {len(known)} classes: at least two of each are needed; is it the right column?"
        )
    taught = {f.label for f in found if f.part == "train"}
    unseen = {f.label: f.part for f in found if f.part not in ("", "train") and f.label not in taught}
    faults += [f"class {label!r} is in {part} and not in train" for label, part in sorted(unseen.items())]
    return faults


def opened(source: Path | Bytes) -> Image.Image:
    """An RGB picture, turned as its EXIF says. Raises DataError with the reason."""
    if not isinstance(source, Path):
        return Image.fromarray(source).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(source, formats=list(FORMATS)) as image:
                return _rgb(source, ImageOps.exif_transpose(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as bomb:
            raise DataError(
                f"{source} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller, "
                "or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
            ) from bomb
        except FileNotFoundError as wrong:
            raise DataError(f"there is no file {source}") from wrong
        except UnidentifiedImageError as wrong:
            raise DataError(f"{source} is no image that can be read ({', '.join(FORMATS)})") from wrong
        except (OSError, ValueError, SyntaxError, EOFError) as wrong:  # PIL's words for damaged files of many kinds
            raise DataError(f"{source} does not open: {str(wrong)[:120]}") from wrong


def _rgb(source: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{source} has {image.mode} pixels, whose white is unknown: save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        seen = image.convert("RGBA")
        ground = Image.new("RGBA", seen.size, "white")  # what is seen through counts as paper, not as hidden colours
        return Image.alpha_composite(ground, seen).convert("RGB")
    return image.convert("RGB")


def pixel_hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
