"""The ways images come: class folders and arrays are read here, tables of paths by the reader of all tables.

`load` chooses by what the path is. Paths in a table are the user's own: relative ones start at the table, absolute ones
are taken as they are. Labels are words and are never joined into a path. It knows no model and no split.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kitout.data.examples.examples import LabeledImage
from kitout.data.examples.formats import detect
from kitout.data.images.image_set import IMAGE_SUFFIXES, ImageRecord, ImageSet, PixelArray, build_image_set
from kitout.data.read import tables
from kitout.data.read.sources import SPLIT_NAMES, FileTable, open_source, split_named
from kitout.data.read.tables import DataError
from kitout.errors import Errors


def load_images(
    source: Path | str, image: str | None = None, label: str | None = None, label_names: Sequence[str] | None = None
) -> ImageSet:
    """A folder of class folders (perhaps below train/, val/, test/), tables, or an .npz with `images` and `labels`.

    image, label: the columns of a table, if not obvious. names: the labels there may be, in order.
    """
    path = Path(source)
    if path.is_dir() and not _has_train_table(path):
        return build_image_set(_read_class_folders(path), label_names, str(path))
    if path.suffix.lower() == ".npz":
        return from_arrays(*_read_npz(path), label_names=label_names, description=str(path))
    columns = {role: column for role, column in (("image", image), ("label", label)) if column is not None}
    return build_image_set(_read_tables(str(source), columns), label_names, str(path))


def from_arrays(
    images: Any, labels: Sequence[Any], label_names: Sequence[str] | None = None, description: str = "the arrays"
) -> ImageSet:
    """images [N, H, W] or [N, H, W, 3]: bytes, or floats from 0 to 1. labels: N words or whole numbers."""
    pixels, words = np.asarray(images), np.asarray(labels)
    faults = Errors(DataError, description)
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] != 3) or 0 in pixels.shape:
        faults.add(f"images have the shape {list(pixels.shape)}, expected [N, H, W] or [N, H, W, 3], channels last")
    elif words.shape != pixels.shape[:1]:
        faults.add(f"{len(pixels)} images and labels of the shape {list(words.shape)}: one label per image, [N]")
    if words.dtype.kind not in "iuU":
        faults.add(f"labels are {words.dtype}, expected whole numbers or words")
    if pixels.dtype.kind == "f":
        low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 1.0)
        if not (low >= 0.0 and high <= 1.0):  # false for NaN too
            faults.add(f"float images run from {low:g} to {high:g}, expected 0 to 1; divide by 255, or give uint8")
    elif pixels.dtype != np.uint8:
        faults.add(f"images are {pixels.dtype}, expected uint8 or floats from 0 to 1")
    faults.raise_if_any()
    plain: PixelArray = np.rint(pixels * 255).astype(np.uint8) if pixels.dtype.kind == "f" else pixels
    rows = zip(plain, words.tolist(), strict=True)
    return build_image_set(
        [ImageRecord(row, str(name), location=f"row {i}: ") for i, (row, name) in enumerate(rows)],
        label_names,
        description,
    )


def _read_npz(path: Path) -> tuple[Any, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            if not {"images", "labels"} <= set(held.files):
                raise DataError(f"{path} holds {', '.join(held.files) or 'nothing'}; expected images and labels")
            return held["images"], held["labels"]
    except FileNotFoundError as wrong:
        raise DataError(f"there is no file {path}") from wrong
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as wrong:  # pickled objects are a ValueError
        raise DataError(f"{path} is no .npz of plain arrays: {str(wrong)[:120]}") from wrong


def _read_tables(source: str, columns: dict[str, str]) -> list[ImageRecord]:
    """What the tables of a source name; relative paths start at their table."""
    if not Path(source).exists() and Path(source.partition("#")[0]).suffix.lower() not in tables.READERS:
        raise DataError(f"there is no file or folder {source}; sets of the hub have to be saved as class folders first")
    found: list[ImageRecord] = []
    for table in open_source(source):
        assert isinstance(table, FileTable)  # the hub is not asked
        rows = table.read_rows()
        for example in detect(rows, table.source, "image", columns).to_examples(rows):
            assert isinstance(example, LabeledImage)
            found.append(
                ImageRecord(table.path.parent / example.path, example.label, table.split, f"{example.location}: ")
            )
    return found


def _has_train_table(root: Path) -> bool:
    return any(p.suffix.lower() in tables.READERS and split_named(p.stem) == "train" for p in root.iterdir())


def _read_class_folders(root: Path) -> list[ImageRecord]:
    faults = Errors(DataError, str(root))
    inside = _list_folders(root)
    parted = {SPLIT_NAMES.get(folder.name.lower(), "") for folder in inside}
    if "train" in parted and "" not in parted:
        found = [f for folder in inside for f in _read_classes(folder, SPLIT_NAMES[folder.name.lower()], faults)]
    else:
        found = _read_classes(root, "", faults)
    faults.raise_if_any()
    return found


def _read_classes(root: Path, split: str, errors: Errors) -> list[ImageRecord]:
    """root/class/**/image.png; the class is the first folder's name."""
    stray = _list_images(root, "*")
    if stray:
        errors.add(f"{len(stray)} images lie in {root} itself ({stray[0].name}): put each in the folder of its class")
    folders = _list_folders(root)
    if not folders and not stray:
        errors.add(f"{root} holds no class folders; expected {root}/CLASS/image.png, or a table of paths and labels")
    found = []
    for folder in folders:
        images = _list_images(folder, "**/*")
        if not images:
            errors.add(f"class folder {folder} holds no images ({' '.join(IMAGE_SUFFIXES)})")
        found += [ImageRecord(image, folder.name, split) for image in images]
    return found


def _list_folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_images(root: Path, pattern: str) -> list[Path]:
    return sorted(
        p
        for p in root.glob(pattern)
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
