"""The same seed gives the same pixels, each image its own change, and only the requested changes are made."""

from __future__ import annotations

import pytest
import torch

from kitout.data.images.augment import Augment
from kitout.data.read.tables import DataError


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(4, 3, 28, 28)


ALL = Augment(min_crop=0.3, horizontal_flip=True, rotate=20, color_jitter=0.4)


def test_the_seed_decides_and_the_global_rng_stays(pixels: torch.Tensor, gpu_seeds: list[int]) -> None:
    first = ALL(pixels, seed=5)
    state = torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(ALL(pixels, seed=5), first)
    assert torch.equal(Augment(0.3, True, 20, 0.4)(pixels, seed=5), first)
    torch.set_rng_state(state)
    ALL(pixels, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert not gpu_seeds
    assert not torch.equal(ALL(pixels, seed=6), first)


def test_shape_and_range_stay(pixels: torch.Tensor) -> None:
    changed = ALL(pixels, seed=0)
    assert changed.shape == pixels.shape
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_each_image_of_a_batch_is_changed_on_its_own(pixels: torch.Tensor) -> None:
    same = pixels[:1].expand(4, -1, -1, -1)
    changed = Augment(horizontal_flip=False)(same, seed=1)
    assert all(not torch.equal(changed[0], other) for other in changed[1:])


@pytest.mark.parametrize("name", ["min_crop", "horizontal_flip", "rotate", "color_jitter"])
def test_each_change_alone(pixels: torch.Tensor, name: str) -> None:
    off = {"min_crop": 1.0, "horizontal_flip": False, "rotate": 0.0, "color_jitter": 0.0}
    assert torch.equal(Augment(**off)(pixels, seed=2), pixels)
    on = {"min_crop": 0.3, "horizontal_flip": True, "rotate": 30.0, "color_jitter": 0.5}
    changed = Augment(**(off | {name: on[name]}))(pixels, seed=2)
    assert not torch.equal(changed, pixels)
    if name == "horizontal_flip":
        both = [torch.equal(c, p) or torch.equal(c, p.flip(-1)) for c, p in zip(changed, pixels, strict=True)]
        assert all(both)


def test_settings_out_of_range_are_reported_together() -> None:
    with pytest.raises(DataError, match=r"3 (errors|errors)"):
        Augment(min_crop=0.0, rotate=-1, color_jitter=2)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r" install .*\[data\]'"):
        Augment()
