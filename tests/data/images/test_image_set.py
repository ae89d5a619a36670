"""What an image file may be, what is done with odd ones, and that every fault of a set is told at once."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kitout.data.images.image_set import ImageRecord, ImageSet, build_image_set, hash_pixels, open_image
from kitout.data.read.tables import DataError
from tiny_images import picture


def bomb(path: Path, side: int = 40_000) -> Path:
    """A PNG of a few bytes that says it is 40,000 pixels wide and high."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )
    return path


def found(tmp_path: Path, *labels: str) -> list[ImageRecord]:
    items = []
    for i, label in enumerate(labels):
        picture("red", i).save(tmp_path / f"{i}.png")
        items.append(ImageRecord(tmp_path / f"{i}.png", label))
    return items


def test_a_set_is_frozen_opens_when_asked_and_is_known_by_its_content(tmp_path: Path) -> None:
    images = build_image_set(found(tmp_path, "a", "b", "a", "b"), None, "x")
    assert images.label_names == ("a", "b")
    assert images.labels == (0, 1, 0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.labels = ()  # type: ignore[misc]
    before = images.digest
    (tmp_path / "0.png").rename(tmp_path / "moved.png")
    with pytest.raises(DataError, match="there is no file"):
        images.open(0)
    moved = dataclasses.replace(images, sources=(tmp_path / "moved.png", *images.sources[1:]))
    assert moved.digest == before
    assert images.subset([1, 0, 2, 3]).digest != before
    assert dataclasses.replace(images, labels=(1, 1, 0, 1)).digest != before


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_pictures_of_every_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path)
    else:
        picture("red", 0).convert(mode).save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    if mode == "I;16":
        assert image.getpixel((0, 0)) == (40_000 >> 8,) * 3


def test_what_is_seen_through_is_paper(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_photographs_stand_upright(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (6, 2), "red"), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (2, 6)


def test_the_same_pixels_have_the_same_hash_in_any_lossless_file(tmp_path: Path) -> None:
    for ending in ("png", "bmp", "tiff"):
        picture("blue", 3).save(tmp_path / f"a.{ending}")
    hashes = {hash_pixels(open_image(path)) for path in tmp_path.iterdir()}
    assert len(hashes) == 1
    assert hash_pixels(Image.new("RGB", (2, 3))) != hash_pixels(Image.new("RGB", (3, 2)))


def test_a_decompression_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    for side in (10_000, 40_000):  # PIL warns of the first and refuses the second
        with pytest.raises(DataError, match=r"has more than 89,478,485 pixels"):
            open_image(bomb(tmp_path / "bomb.png", side))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no image that can be read"),
        (b"not an image at all", "is no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "is no image that can be read"),
        (b"\x89PNG\r\n\x1a\n", "is no image that can be read|does not open"),
        (b"GIF89a\x01\x00", "is no image that can be read|does not open"),
        (None, "there is no file"),
    ],
)
def test_what_is_no_image_says_so(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=said):
        open_image(tmp_path / "a.png")


def test_a_file_cut_short_and_a_float_image_are_refused(tmp_path: Path) -> None:
    picture("red", 0, 64).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    with pytest.raises(DataError, match="does not open"):
        open_image(tmp_path / "a.jpg")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match="F pixels, whose white is unknown"):
        open_image(tmp_path / "f.tif")


def test_every_fault_of_a_set_is_told_at_once(tmp_path: Path) -> None:
    items = found(tmp_path, "cat", "", "cta", "cat")
    (tmp_path / "0.png").write_bytes(b"broken")
    items.append(ImageRecord(tmp_path / "gone.png", "dog", location="line 9: "))
    with pytest.raises(DataError) as caught:
        build_image_set(items, ["cat", "dog"], "pets.csv")
    said = str(caught.value)
    for part in ("pets.csv: 4 errors", "0.png is no image", "line 9: there is no file", "label is empty",
                 "label 'cta' is none of the given; did you mean 'cat'?"):  # fmt: skip
        assert part in said


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        ((), None, "it holds no images"),
        (("a", "a", "a"), None, r"one label \(a\): at least 2 classes"),
        (("a", "b", "c", "d"), None, "4 images for 4 classes"),
        (("a", "b", "a", "b"), ["a", "b", "a"], "the given labels repeat"),
    ],
)
def test_what_is_no_classification(tmp_path: Path, labels: tuple[str, ...], names: list[str] | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        build_image_set(found(tmp_path, *labels), names, "x")


def test_a_class_of_the_test_part_must_be_taught(tmp_path: Path) -> None:
    parts = ["train", "train", "train", "train", "test", "test"]
    items = found(tmp_path, "a", "b", "a", "b", "a", "c")
    items = [dataclasses.replace(item, split=part) for item, part in zip(items, parts, strict=True)]
    with pytest.raises(DataError, match="class 'c' is in test and not in train"):
        build_image_set(items, None, "x")


def test_many_broken_images_are_counted(tmp_path: Path) -> None:
    items = [ImageRecord(tmp_path / f"{i}.png", "ab"[i % 2]) for i in range(20)]
    with pytest.raises(DataError, match="and 15 more such images"):
        build_image_set(items, None, "x")


def test_names_given_fix_the_order(tmp_path: Path) -> None:
    images: ImageSet = build_image_set(found(tmp_path, "a", "b", "a", "b", "a", "b"), ["c", "b", "a"], "x")
    assert images.label_names == ("c", "b", "a")
    assert images.labels == (2, 1, 2, 1, 2, 1)
