"""The model's own image processor, at its own size or a multiple of the patches, augmented before normalization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from kitout.data.images.augment import Augment
from kitout.data.images.image_set import ImageSet, open_image
from kitout.data.images.pixels import PixelProcessor, check_size
from kitout.data.read.image_folders import load_images
from kitout.data.read.tables import DataError
from tiny_images import folder, picture
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
    with pytest.raises(DataError, match=r"set one, data\.image_size=224"):
        PixelProcessor.from_pretrained(model_path)(mixed, range(len(mixed)))
    assert PixelProcessor.from_pretrained(model_path, size=32)(mixed, range(len(mixed))).shape == (7, 3, 32, 32)


PROCESSORS = ["BeitImageProcessorPil", "BitImageProcessorPil", "CLIPImageProcessorPil", "ConvNextImageProcessorPil",
              "DeiTImageProcessorPil", "EfficientNetImageProcessorPil", "LevitImageProcessorPil",
              "MobileNetV2ImageProcessorPil", "MobileViTImageProcessorPil", "PoolFormerImageProcessorPil",
              "SegformerImageProcessorPil", "SiglipImageProcessorPil", "ViTImageProcessorPil"]  # fmt: skip


def unequal(root: Path, modes: tuple[str, ...]) -> ImageSet:
    """Images of other modes and sizes, as people have them."""
    for number, mode in enumerate(modes):
        folder_path = root / "ab"[number % 2]
        folder_path.mkdir(parents=True, exist_ok=True)
        image = picture("red", number).resize((20 + 9 * number, 50 - 5 * number)).convert(mode)
        image.save(folder_path / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    return load_images(root)


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_unequal_batch_is_read_as_the_processor_reads_each(tmp_path: Path, name: str) -> None:
    mixed = unequal(tmp_path, ("RGB", "L", "CMYK", "P", "1", "LA", "RGBA"))
    processor = getattr(transformers, name)()
    batch = PixelProcessor(processor)(mixed, range(len(mixed)))
    for i, pixels in enumerate(batch):
        assert mixed.open(i).mode == "RGB"
        assert torch.equal(pixels, processor(mixed.open(i), return_tensors="pt")["pixel_values"][0])


def test_gray_and_cmyk_have_their_colors(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (200, 40, 10)).convert("CMYK").save(tmp_path / "c.tiff")
    Image.new("L", (20, 30), 120).save(tmp_path / "g.png")
    for name, color in (("c.tiff", (200, 40, 10)), ("g.png", (120, 120, 120))):
        assert open_image(tmp_path / name).getpixel((3, 3)) == pytest.approx(color, abs=2)


def test_a_model_of_one_channel_reads_gray(tmp_path: Path) -> None:
    mixed = unequal(tmp_path / "images", ("RGB", "L", "CMYK", "P"))
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_channels=1)
    config.save_pretrained(tmp_path / "model")
    gray = SQUARE | {"image_mean": [0.5], "image_std": [0.5]}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(gray))
    assert PixelProcessor.from_pretrained(tmp_path / "model")(mixed, range(4)).shape == (4, 1, 32, 32)


def test_a_processor_that_gives_no_images_is_refused(tmp_path: Path) -> None:
    mixed = unequal(tmp_path, ("RGB", "L", "P", "1"))
    with pytest.raises(DataError, match=r"Siglip2.*gives \[.*pixel_attention_mask, spatial_shapes"):
        PixelProcessor(transformers.Siglip2ImageProcessorPil())(mixed, range(2))


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image processor that loads"):
        PixelProcessor.from_pretrained(tmp_path)
