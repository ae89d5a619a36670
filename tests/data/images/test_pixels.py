"""The model's own image processor, at its own size or a multiple of the patches, augmented before normalization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kitout.data.images.augment import Augment
from kitout.data.images.image_set import ImageSet
from kitout.data.images.pixels import PixelProcessor, check_size
from kitout.data.read.image_folders import load_images
from kitout.data.read.tables import DataError
from tiny_images import folder
from zoo import ZOO

NORMAL = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_rescale": True}
CROPS = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
} | NORMAL
SQUARE = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}} | NORMAL
FREE = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False} | NORMAL


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return load_images(folder(tmp_path / "images", each=2))


def model(path: Path, processor: dict[str, Any]) -> Path:
    ZOO["dinov2"].build().config.save_pretrained(path)  # patches of 8
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


@pytest.mark.parametrize("processor", [CROPS, SQUARE], ids=["crops", "square"])
def test_its_own_size_and_another(tmp_path: Path, images: ImageSet, processor: dict[str, Any]) -> None:
    model_path = model(tmp_path / "model", processor)
    assert PixelProcessor.from_pretrained(model_path)(images, [0, 3, 5]).shape == (3, 3, 32, 32)
    assert PixelProcessor.from_pretrained(model_path, size=48)(images, [0, 3]).shape == (2, 3, 48, 48)
    red = PixelProcessor.from_pretrained(model_path)(images, [4])[0].mean(dim=(1, 2))  # red squares: (220, 40, 40)
    torch.testing.assert_close(
        red, (torch.tensor([220, 40, 40]) / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4]),
        atol=0.15, rtol=0,
    )  # fmt: skip


def test_a_size_that_is_not_a_multiple_of_the_patches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="size 50 is not a multiple of this model's patches of 8: use 48 or 56"):
        PixelProcessor.from_pretrained(model(tmp_path, CROPS), size=50)
    with pytest.raises(DataError, match="patches of 16: use 16"):
        check_size(8, [8, 16])
    check_size(112, 14)


def test_augmented_only_with_a_seed_and_normalized_after_it(tmp_path: Path, images: ImageSet) -> None:
    model_path = model(tmp_path / "model", CROPS)
    plain, identity = (
        PixelProcessor.from_pretrained(model_path),
        PixelProcessor.from_pretrained(model_path, augment=Augment(min_crop=1.0, horizontal_flip=False)),
    )
    augmented = PixelProcessor.from_pretrained(model_path, augment=Augment())
    rows = [0, 1, 2]
    torch.testing.assert_close(identity(images, rows, seed=3), plain(images, rows))
    assert torch.equal(augmented(images, rows), plain(images, rows))
    assert not torch.equal(augmented(images, rows, seed=3), plain(images, rows))
    assert torch.equal(
        augmented(images, rows, seed=3),
        PixelProcessor.from_pretrained(model_path, augment=Augment())(images, rows, seed=3),
    )


def test_images_of_many_shapes_need_a_size_if_nothing_is_cropped(tmp_path: Path) -> None:
    images = load_images(folder(tmp_path / "images", each=2))
    images.open(0).resize((24, 60)).save(tmp_path / "images" / "red" / "tall.png")
    mixed = load_images(tmp_path / "images")
    model_path = model(tmp_path / "model", FREE)
    with pytest.raises(DataError, match="set one, size=224"):
        PixelProcessor.from_pretrained(model_path)(mixed, range(len(mixed)))
    assert PixelProcessor.from_pretrained(model_path, size=32)(mixed, range(len(mixed))).shape == (7, 3, 32, 32)


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image processor that loads"):
        PixelProcessor.from_pretrained(tmp_path)
