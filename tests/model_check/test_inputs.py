"""Rows are cut out of any batch, images with the rows they stand in; differences are shares of the largest value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kitout.errors import ConfigError
from kitout.model_check.inputs import CheckBatch, difference, largest_difference, plain_batch

IMAGE = 98
TEXT = torch.arange(12).reshape(3, 4)
PIXELS = torch.arange(6.0).reshape(3, 2)


def test_rows_of_tensors_with_one_entry_each() -> None:
    positions = torch.arange(24).reshape(2, 3, 4)  # rows along dimension 1
    batch = CheckBatch({"input_ids": TEXT, "position_ids": positions, "pixels": PIXELS, "flag": True}, 3)
    cut = batch.rows(2, 0)
    assert cut.num_rows == 2
    assert torch.equal(cut.inputs["input_ids"], TEXT[[2, 0]])
    assert torch.equal(cut.inputs["position_ids"], positions[:, [2, 0]])
    assert torch.equal(cut.inputs["pixels"], PIXELS[[2, 0]])
    assert cut.inputs["flag"] is True


def test_patches_of_one_image_per_row() -> None:
    patches = torch.arange(12.0)[:, None]
    assert CheckBatch({"input_ids": TEXT, "pixels": patches}, 3).rows(1).inputs["pixels"].flatten().tolist() == [
        4,
        5,
        6,
        7,
    ]


@pytest.mark.parametrize("patches_each", [1, 4])
def test_images_follow_the_rows_they_stand_in(patches_each: int) -> None:
    ids = TEXT.clone()
    ids[0, :2], ids[2, 0] = IMAGE, IMAGE  # two images, none, one
    pixels = torch.arange(3 * patches_each)[:, None]
    batch = CheckBatch(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixels": pixels}, 3, special_ids=(IMAGE,)
    )
    shares = [batch.rows(i).inputs["pixels"] for i in range(3)]
    assert [None if s is None else s.flatten().tolist() for s in shares] == [
        list(range(2 * patches_each)),
        None,
        list(range(2 * patches_each, 3 * patches_each)),
    ]
    assert [len(batch.rows(i).inputs["attention_mask"]) for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("got", "want", "expected"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 0.5),
        (torch.tensor([1.0]), torch.tensor([1.0, 4.0]), math.inf),
        (torch.tensor([math.nan, 4.0]), torch.tensor([1.0, 4.0]), math.nan),
        (torch.tensor([0.0, 4.0]), torch.tensor([-math.inf, 4.0]), 0.0),  # the base masks this one itself
        (torch.zeros(0), torch.zeros(0), 0.0),
    ],
)
def test_a_difference_is_a_share_of_the_largest_value(got: Tensor, want: Tensor, expected: float) -> None:
    found = difference(got, want)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_nan_is_worse_than_any_number() -> None:
    one = torch.ones(1)
    found = largest_difference({"a": one * math.nan, "b": one * 9, "c": one}, dict.fromkeys("abc", one), "bac")
    assert math.isnan(found)
    assert largest_difference({"a": one}, {"a": one, "b": one}, "ab") == math.inf, "an output is missing"


def test_a_model_whose_batch_is_not_known() -> None:
    with pytest.raises(ConfigError, match="no batch can be made up for this model"):
        plain_batch(nn.Linear(2, 2), None)
    with pytest.raises(ConfigError, match="the example batch has no rows: its tensors are flag"):
        plain_batch(nn.Linear(2, 2), {"flag": True})
