"""The loop teaches, a kill costs nothing, what is frozen stays in eval mode, and augmentation reaches the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kitout import AdaptFormer, BitFit, Kit, LoRA, PartialFineTuning
from kitout.data.images.augment import Augment
from kitout.errors import ConfigError
from kitout.method import Method
from kitout.train import images as training
from kitout.train.images import Diverged, Progress, Recipe, fit, plan, predict
from kitout.train.setup.heads import batchnorm, linear
from tiny_vision import CLASSES, images, kit, pixels

RECIPE = Recipe(lr=1e-2, epochs=6, batch=8)


def wearing(method: Method, heads: object = linear, species: str = "dinov2") -> Kit:
    worn = kit(species)
    worn.add("a", method, seed=0, heads=heads(worn, CLASSES) if heads else None)  # type: ignore[operator]
    return worn


def accuracy(worn: Kit) -> float:
    held = images(seed=99)
    return (predict(worn, "a", held, pixels()).argmax(1) == torch.tensor(held.labels)).float().mean().item()


@pytest.mark.parametrize("species", ["dinov2", "vit", "swin", "timm-vit"])
def test_it_learns_on_every_kind_of_model(species: str) -> None:
    worn = wearing(LoRA(rank=4, targets="all-linear"), species=species)
    base = {key: value.clone() for key, value in worn.base.state_dict().items()}
    done = fit(worn, "a", images(), pixels(), RECIPE)
    assert accuracy(worn) > 0.6
    assert sum(done.losses[-5:]) < 0.6 * sum(done.losses[:5])
    assert (done.step, done.images) == (30, 240)
    assert done.processor_seconds > 0
    assert 0 < done.trunk_seconds < done.seconds
    assert all(torch.equal(value, base[key]) for key, value in worn.base.state_dict().items())
    assert worn.active is None


def test_with_a_trunk_it_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (2**30, 0):
        monkeypatch.setattr(training, "MOST_KEPT", most)
        worn = wearing(PartialFineTuning(last=1), batchnorm)
        done = fit(worn, "a", images(), pixels(), RECIPE)
        assert (done.trunk_seconds > 0) == (most > 0)
        found.append(predict(worn, "a", images(seed=9), pixels()))
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=1e-3)


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", [AdaptFormer(width=8), PartialFineTuning(last=1)], ids=["dropout", "trunk"])
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path: Path, method: Method) -> None:
    recipe = Recipe(lr=3e-3, epochs=2, batch=8, save_every=0.0)
    whole = wearing(method, batchnorm)
    expected = fit(whole, "a", images(), pixels(), recipe)

    def kill(done: Progress) -> None:
        if done.step == 4:
            raise Killed

    with pytest.raises(Killed):
        fit(wearing(method, batchnorm), "a", images(), pixels(), recipe, tmp_path / "c", "r", kill)
    again = wearing(method, batchnorm)
    done = fit(again, "a", images(), pixels(), recipe, tmp_path / "c", "r")
    assert done.resumed_at == [4]
    assert done.losses == expected.losses
    for key, value in again["a"].state_dict().items():  # running statistics of the head too
        assert torch.equal(value, whole["a"].state_dict()[key]), key
    other = fit(wearing(method, batchnorm), "a", images(), pixels(), recipe, tmp_path / "c", "another run")
    assert not other.resumed_at


def test_the_base_is_in_eval_mode_and_the_adapter_in_training_mode() -> None:
    worn = wearing(AdaptFormer(width=4), batchnorm)
    modes = []
    worn.base.get_submodule("dinov2.encoder.layer.0").register_forward_hook(
        lambda module, *_: modes.append((module.training, worn["a"].training))
    )
    fit(worn, "a", images(2), pixels(augment=Augment()), Recipe(epochs=1, batch=5))
    assert set(modes) == {(False, True)}
    assert not worn["a"].training


def test_other_adapters_stay_as_they_are() -> None:
    worn = wearing(LoRA(rank=2))
    other = worn.add("b", BitFit(), seed=1)
    before = [value.clone() for value in other.parameters()]
    fit(worn, "a", images(2), pixels(), Recipe(epochs=1, batch=5))
    assert all(torch.equal(old, new) for old, new in zip(before, other.parameters(), strict=True))


def test_augmented_pixels_reach_the_model_by_the_seed() -> None:
    losses = {}
    for name, change, seed in (("no", None, 0), ("yes", Augment(), 0), ("same", Augment(), 0), ("other", Augment(), 1)):
        worn = wearing(LoRA(rank=2))
        recipe = Recipe(epochs=1, batch=5, seed=seed)
        losses[name] = fit(worn, "a", images(2), pixels(augment=change), recipe).losses
    assert losses["yes"] == losses["same"]
    assert losses["yes"] != losses["no"]
    assert losses["yes"] != losses["other"]


def test_one_dimension_does_not_decay_and_heads_have_their_own_rate() -> None:
    worn = wearing(LoRA(rank=2))
    groups = training._groups(worn["a"], Recipe(lr=0.1, head_lr=0.2, decay=0.3))
    by = {(g["lr"], g["weight_decay"]): [p.ndim for p in g["params"]] for g in groups}  # type: ignore[attr-defined]
    assert by == {(0.1, 0.3): [2] * 12, (0.2, 0.3): [2], (0.2, 0.0): [1]}


def test_the_plan_shows_every_image_as_often_and_batches_are_full() -> None:
    recipe = Recipe(epochs=2.5, batch=4, seed=3)
    steps = plan(16, recipe)
    assert [len(step) for step in steps] == [4] * 10
    shown = [row for step in steps for row in step]
    assert sorted(shown[:16]) == sorted(shown[16:32]) == list(range(16))
    assert shown[:16] != shown[16:32]
    assert plan(16, recipe) == steps
    assert plan(3, Recipe(epochs=1, batch=4)) == plan(3, Recipe(epochs=0.1, batch=4))  # at least one step
    assert len(plan(3, Recipe(epochs=1, batch=4))[0]) == 4


def test_faults_of_a_recipe_are_told_together_and_a_loss_of_no_number_stops() -> None:
    with pytest.raises(ConfigError, match="4 faults"):
        Recipe(lr=0.0, head_lr=-1.0, epochs=float("inf"), batch=1)
    worn = wearing(LoRA(rank=2))
    with torch.no_grad():
        worn["a"].heads["classifier"].module.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="step 1: the loss is nan; try a lower lr"):
        fit(worn, "a", images(2), pixels(), Recipe(epochs=1, batch=5))


def test_predicting_tells_how_far_it_is_and_can_ask_the_base() -> None:
    worn, told = wearing(LoRA(rank=2)), []
    out = predict(worn, None, images(2), pixels(), lambda done, total: told.append((done, total)), batch=4)
    assert told == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert out.shape == (10, CLASSES)


def test_positions_are_stretched_where_the_model_has_to_be_asked() -> None:
    worn = wearing(LoRA(rank=2), species="vit")
    assert predict(worn, "a", images(2), pixels(size=48)).shape == (2 * CLASSES, CLASSES)
