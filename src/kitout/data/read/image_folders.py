"""Image sets from class folders, arrays and tables of paths (those by the reader of all tables).

`load_images` chooses by what the path is. Paths in a table are the user's own: relative ones start at the table,
absolute ones are taken as they are. Labels are never joined into a path. It knows no model and makes no split.
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
from kitout.data.read.row_sample import RowSample
from kitout.data.read.sources import SPLIT_NAMES, FileTable, open_source, split_named
from kitout.data.read.tables import DataError
from kitout.errors import Errors


def load_images(
    source: Path | str, image: str | None = None, label: str | None = None, label_names: Sequence[str] | None = None,
    skipped: list[str] | None = None, sample: RowSample | None = None, to_train: bool = True,
) -> ImageSet:  # fmt: skip
    """A folder of class folders (perhaps in train/, val/, test/), tables, or an .npz with `images` and `labels`.

    image, label: the columns of a table, if not obvious. label_names: all classes, in order. skipped: gets a message
    for every bad image or row, which is left out; None: they are errors. sample: draws those that are opened.
    to_train: False: any number of images will do.
    """
    path = Path(source)
    if path.is_dir() and not _has_train_table(path):
        return build_image_set(_read_class_folders(path), label_names, str(path), skipped, sample, to_train)
    if path.suffix.lower() == ".npz":
        return from_arrays(
            *_read_npz(path), label_names=label_names, description=str(path), sample=sample, to_train=to_train
        )
    columns = {role: column for role, column in (("image", image), ("label", label)) if column is not None}
    records = _read_tables(str(source), columns, skipped)
    return build_image_set(records, label_names, str(path), skipped, sample, to_train)


def from_arrays(
    images: Any, labels: Sequence[Any], label_names: Sequence[str] | None = None, description: str = "the arrays",
    sample: RowSample | None = None, to_train: bool = True,
) -> ImageSet:  # fmt: skip
    """images [N, H, W] or [N, H, W, 3]: uint8, or floats from 0 to 1. labels: N names or whole numbers."""
    pixels, label_array = np.asarray(images), np.asarray(labels)
    errors = Errors(DataError, description)
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] != 3) or 0 in pixels.shape:
        errors.add(f"images have the shape {list(pixels.shape)}, expected [N, H, W] or [N, H, W, 3], channels last")
    elif label_array.shape != pixels.shape[:1]:
        errors.add(f"{len(pixels)} images and labels of the shape {list(label_array.shape)}: one label per image, [N]")
    if label_array.dtype.kind not in "iuU":
        errors.add(f"labels are {label_array.dtype}, expected whole numbers or names")
    if pixels.dtype.kind == "f":
        low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 1.0)
        if not (low >= 0.0 and high <= 1.0):  # false for NaN too
            errors.add(f"float images run from {low:g} to {high:g}, expected 0 to 1; divide by 255, or give uint8")
    elif pixels.dtype != np.uint8:
        errors.add(f"images are {pixels.dtype}, expected uint8 or floats from 0 to 1")
    errors.raise_if_any()
    images_uint8: PixelArray = np.rint(pixels * 255).astype(np.uint8) if pixels.dtype.kind == "f" else pixels
    rows = zip(images_uint8, label_array.tolist(), strict=True)
    return build_image_set(
        [ImageRecord(row, str(name), location=f"row {i}: ") for i, (row, name) in enumerate(rows)],
        label_names,
        description,
        sample=sample,
        to_train=to_train,
    )


def _read_npz(path: Path) -> tuple[Any, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if not {"images", "labels"} <= set(arrays.files):
                raise DataError(f"{path} has {', '.join(arrays.files) or 'nothing'}; expected images and labels")
            return arrays["images"], arrays["labels"]
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (
        OSError,
        ValueError,
        EOFError,
        MemoryError,
        zipfile.BadZipFile,
    ) as error:  # pickled objects are a ValueError
        raise DataError(f"{path} is not an .npz of plain arrays: {str(error)[:120]}") from error


def _read_tables(source: str, columns: dict[str, str], skipped: list[str] | None) -> list[ImageRecord]:
    """The images that the tables of a source name; relative paths start at their table."""
    if not Path(source).exists() and Path(source.partition("#")[0]).suffix.lower() not in tables.READERS:
        raise DataError(f"there is no file or folder {source}; sets of the hub have to be saved as class folders first")
    records: list[ImageRecord] = []
    for table in open_source(source):
        assert isinstance(table, FileTable)  # the hub is not asked
        rows = table.read_rows(skipped)
        for example in detect(rows, table.source, "image", columns).to_examples(rows, skipped):
            assert isinstance(example, LabeledImage)
            image = example.content or table.path.parent / example.path
            records.append(ImageRecord(image, example.label, table.split, f"{example.location}: "))
    return records


def _has_train_table(root: Path) -> bool:
    return any(p.suffix.lower() in tables.READERS and split_named(p.stem) == "train" for p in root.iterdir())


def _read_class_folders(root: Path) -> list[ImageRecord]:
    errors = Errors(DataError, str(root))
    folders = {folder: SPLIT_NAMES.get(folder.name.lower(), "") for folder in _list_folders(root)}
    if "train" in folders.values() and all(folders.values()):
        records = [record for folder, split in folders.items() for record in _read_classes(folder, split, errors)]
    else:
        records = _read_classes(root, "", errors)
    errors.raise_if_any()
    return records


def _read_classes(root: Path, split: str, errors: Errors) -> list[ImageRecord]:
    """root/class/**/image.png; the first folder names the class."""
    misplaced = list_images(root, "*")
    if misplaced:
        errors.add(f"{len(misplaced)} images are in {root} itself ({misplaced[0].name}): move each to its class folder")
    folders = _list_folders(root)
    if not folders and not misplaced:
        errors.add(f"{root} has no class folders; expected {root}/CLASS/image.png, or a table of paths and labels")
    records = []
    for folder in folders:
        images = list_images(folder, "**/*")
        if not images:
            errors.add(f"class folder {folder} has no images ({' '.join(IMAGE_SUFFIXES)})")
        records += [ImageRecord(image, folder.name, split) for image in images]
    return records


def _list_folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def list_images(root: Path, pattern: str) -> list[Path]:
    """Files that are images by their ending, sorted."""
    return sorted(
        p
        for p in root.glob(pattern)
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
