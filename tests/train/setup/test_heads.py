"""Heads are those of the papers, replace the model's own, and are saved with the adapter, statistics included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kitout import AdaptFormer
from kitout.errors import ConfigError
from kitout.train.setup.heads import batchnorm_head, build_heads, copy_heads
from tiny_vision import kit


@pytest.mark.parametrize(("species", "path"), [("dinov2", "classifier"), ("swin", "classifier"), ("timm-vit", "head")])
@pytest.mark.parametrize("kind", ["linear", "batchnorm"])
def test_they_replace_the_models_own_head(species: str, path: str, kind: str, gpu_seeds: list[int]) -> None:
    classifier_kit = kit(species)
    own = classifier_kit.base.get_submodule(path)
    assert isinstance(own, nn.Linear)
    gpu_seeds.clear()  # of the model that was built
    heads = build_heads(copy_heads(classifier_kit, (), is_language_model=False), (), 7, 0, kind)
    assert list(heads) == [path]
    assert isinstance(heads[path], nn.Linear) == (kind == "linear")
    assert heads[path](torch.randn(3, own.in_features)).shape == (3, 7)
    assert not gpu_seeds
    with torch.device("meta"):  # another default device has a generator of its own
        again = build_heads(copy_heads(classifier_kit, (), is_language_model=False), (), 7, 0, kind)
    assert all(torch.equal(a, b) for a, b in zip(heads[path].parameters(), again[path].parameters(), strict=True))


def test_a_head_the_checkpoint_holds_for_as_many_classes_keeps_its_values() -> None:
    classifier_kit = kit()
    own = classifier_kit.base.get_submodule("classifier")
    heads = copy_heads(classifier_kit, (), is_language_model=False)
    assert torch.equal(build_heads(heads, (), own.out_features, 0)["classifier"].weight, own.weight)
    assert not torch.equal(build_heads(heads, ("classifier",), own.out_features, 0)["classifier"].weight, own.weight)


def test_the_batch_norm_has_no_gain_and_follows_adaptformers_code() -> None:
    torch.manual_seed(0)
    norm, last = batchnorm_head(96, 50)
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.affine, norm.eps) == (False, 1e-6)
    assert isinstance(last, nn.Linear)
    assert abs(last.weight.std().item() - 0.01) < 0.001
    assert not last.bias.any()


@pytest.mark.parametrize("kind", ["linear", "batchnorm"])
def test_the_seed_decides(kind: str) -> None:
    heads = copy_heads(kit(), (), is_language_model=False)
    state = torch.get_rng_state()
    first, same, other = (build_heads(heads, (), 4, seed, kind)["classifier"].state_dict() for seed in (1, 1, 2))
    key = [name for name in first if name.endswith("weight")][-1]
    assert torch.equal(first[key], same[key])
    assert not torch.equal(first[key], other[key])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_that_is_not_linear_has_no_batchnorm() -> None:
    with pytest.raises(ConfigError, match=r"takes the place of a linear classifier.*train.head=linear"):
        build_heads({"head": nn.Sequential(nn.Linear(4, 4))}, (), 3, 0, "batchnorm")


def test_running_statistics_are_saved_and_restored(tmp_path: Path) -> None:
    classifier_kit, pixels = kit(), torch.randn(6, 3, 32, 32)
    width = classifier_kit.base.get_submodule("classifier").in_features
    classifier_kit.add("a", AdaptFormer(), heads={"classifier": batchnorm_head(width, 3)})
    classifier_kit.eval()
    classifier_kit["a"].train()
    with classifier_kit.use("a"), torch.no_grad():
        classifier_kit(pixels)
        classifier_kit.eval()
        before = classifier_kit(pixels).logits
    classifier_kit.save("a", tmp_path / "a")
    classifier_kit.load(tmp_path / "a", name="b")
    norm = classifier_kit["b"].heads["classifier"].module[0]
    assert norm.num_batches_tracked == 1
    with classifier_kit.use("b"), torch.no_grad():
        assert torch.equal(classifier_kit(pixels).logits, before)
