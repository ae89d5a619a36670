"""The heads are the papers', stand where the model's own stands, and travel with the adapter, statistics included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kitout import AdaptFormer, LoRA
from kitout.errors import TargetError
from kitout.train.setup.heads import batchnorm, head_site, linear
from tiny_vision import kit


@pytest.mark.parametrize(("species", "path"), [("dinov2", "classifier"), ("swin", "classifier"), ("timm-vit", "head")])
def test_they_stand_where_the_models_own_head_does(species: str, path: str) -> None:
    worn = kit(species)
    own = worn.base.get_submodule(path)
    assert isinstance(own, nn.Linear)
    for make in (linear, batchnorm):
        heads = make(worn, 7)
        assert list(heads) == [path]
        assert heads[path](torch.randn(3, own.in_features)).shape == (3, 7)


def test_the_batch_norm_has_no_gain_and_follows_adaptformers_code() -> None:
    norm, last = batchnorm(kit(), 50)["classifier"]
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.affine, norm.eps) == (False, 1e-6)
    assert abs(last.weight.std().item() - 0.01) < 0.001
    assert not last.bias.any()


def test_the_seed_decides() -> None:
    worn = kit()
    state = torch.get_rng_state()
    first, same, other = (linear(worn, 4, seed)["classifier"].weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_running_statistics_are_saved_and_restored(tmp_path: Path) -> None:
    worn, pixels = kit(), torch.randn(6, 3, 32, 32)
    worn.add("a", AdaptFormer(), heads=batchnorm(worn, 3))
    worn.eval()
    worn["a"].train()
    with worn.use("a"), torch.no_grad():
        worn(pixels)
        worn.eval()
        before = worn(pixels).logits
    worn.save("a", tmp_path / "a")
    worn.load(tmp_path / "a", name="b", heads=batchnorm(worn, 3, seed=9))
    norm = worn["b"].heads["classifier"].module[0]
    assert norm.num_batches_tracked == 1
    with worn.use("b"), torch.no_grad():
        assert torch.equal(worn(pixels).logits, before)


def test_a_model_without_one_linear_head_says_so() -> None:
    import transformers

    import kitout

    bare = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32
        )
    )
    worn = kitout.attach(bare)
    worn.add("a", LoRA(rank=2))
    with pytest.raises(TargetError, match="one linear head is expected, found none"):
        head_site(worn)
