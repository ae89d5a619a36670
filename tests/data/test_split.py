"""No pixel on both sides, classes in their shares, parts respected, and a test set that stays when training grows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kitout.data.images.image_set import Images
from kitout.data.read.image_folders import from_arrays, load
from kitout.data.read.tables import DataError
from kitout.data.split import split
from tiny_images import folder


def some(*counts: int) -> Images:
    """`counts[k]` different images of class k."""
    labels = [k for k, n in enumerate(counts) for _ in range(n)]
    pixels = np.zeros((len(labels), 2, 2), dtype=np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = np.arange(len(labels)) % 256, np.arange(len(labels)) // 256
    return from_arrays(pixels, labels)


def test_classes_keep_their_shares() -> None:
    parts = split(some(300, 90, 60), test=45, train=90)
    assert Counter(parts.test.labels) == {0: 30, 1: 9, 2: 6}
    assert Counter(parts.train.labels) == {0: 60, 1: 18, 2: 12}
    assert parts.majority == 30 / 45
    assert not set(parts.test.hashes) & set(parts.train.hashes)


def test_the_test_set_depends_on_the_seed_and_not_on_the_training_set() -> None:
    images = some(60, 60)
    small, large = split(images, 20, 30), split(images, 20)
    assert small.test.digest == large.test.digest
    assert len(large.train) == 100
    assert split(images, 20, seed=1).test.digest != small.test.digest
    assert split(images, 20, 30).train.digest == small.train.digest


def test_copies_count_once_and_never_stand_on_both_sides() -> None:
    images = some(40, 40)
    doubled = images.pick([*range(80), *range(80), *range(40)])
    parts = split(doubled, 26)
    assert parts.dropped == 120
    assert len(parts.train) + len(parts.test) == 80
    assert not set(parts.test.hashes) & set(parts.train.hashes)


def test_copies_take_the_label_most_of_them_carry() -> None:
    pixels = np.repeat(np.arange(12, dtype=np.uint8)[:, None, None], 2, axis=1).repeat(2, axis=2)
    images = from_arrays(np.concatenate([pixels, pixels[:1], pixels[:1]]), [0, 1] * 6 + [1, 1])
    parts = split(images, 4)
    sides = (parts.train, parts.test)
    labels = {pixels: label for side in sides for pixels, label in zip(side.hashes, side.labels, strict=True)}
    assert parts.dropped == 2
    assert labels[images.hashes[0]] == 1


def test_small_classes_are_never_tested_on_without_being_taught() -> None:
    parts = split(some(100, 2), test=34)
    assert 1 in parts.train.labels
    with pytest.raises(DataError, match="class '1' has 1 different images: 2 are needed"):
        split(some(100, 1), test=10)


def test_named_parts_are_respected_and_cleaned(tmp_path: Path) -> None:
    folder(tmp_path / "train", each=6)
    folder(tmp_path / "val", each=2, first=100)
    folder(tmp_path / "test", each=3, first=200)
    (tmp_path / "train" / "red" / "leak.png").write_bytes((tmp_path / "test" / "red" / "0.png").read_bytes())
    (tmp_path / "train" / "red" / "twice.png").write_bytes((tmp_path / "train" / "red" / "0.png").read_bytes())
    (tmp_path / "train" / "red" / "other.png").write_bytes((tmp_path / "val" / "red" / "0.png").read_bytes())
    parts = split(load(tmp_path), test=100)
    assert set(parts.test.parts) == {"test"}
    assert set(parts.train.parts) == {"train"}
    assert (len(parts.test), len(parts.train), parts.dropped) == (9, 18, 3)
    assert len(split(load(tmp_path), test=6, train=9).test) == 6


def test_validation_is_measured_on_where_there_is_no_test(tmp_path: Path) -> None:
    folder(tmp_path / "train", each=4)
    folder(tmp_path / "valid", each=2, first=100)
    assert set(split(load(tmp_path), test=100).test.parts) == {"val"}


def test_a_training_part_that_is_the_test_part_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "train", each=3)
    folder(tmp_path / "test", each=3)
    with pytest.raises(DataError, match="train has fewer than 2 classes"):
        split(load(tmp_path), test=9)


def test_nothing_to_measure_on_is_refused() -> None:
    with pytest.raises(DataError, match="0 of 10 images were asked for"):
        split(some(5, 5), test=0)
