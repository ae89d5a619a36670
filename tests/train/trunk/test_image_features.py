"""Cached features of the frozen trunk give the logits and gradients of the whole model, for any model and method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import kitout
from kitout import VPT, AdaptFormer, FullFineTuning, Kit, LoRA, PartialFineTuning
from kitout.method import Method
from kitout.train.objectives.image_classification import image_logits
from kitout.train.setup.heads import batchnorm_head, linear_head
from kitout.train.trunk.image_features import FrozenTrunk
from tiny_vision import kit as vision_kit
from zoo import image_batch

MODELS = ["dinov2", "vit", "swin", "timm-vit"]
LATE: dict[str, Method] = {
    "linear": PartialFineTuning(part="head"),
    "last": PartialFineTuning(last=1),
    "lora": LoRA(rank=2, targets="attn.o mlp.down", layers="last:1"),
    "adaptformer": AdaptFormer(layers="last:1", dropout=0.0),
    "everywhere": LoRA(rank=2),
}


def heads_of_kind(kit: Kit, make: Callable[[int, int], nn.Module]) -> dict[str, nn.Module]:
    return {site.path: make(site.d_in, 5) for site in kit.survey.sites if site.role == "head"}


def images(rows: int, seed: int = 0) -> torch.Tensor:
    return image_batch(rows, seed)["pixel_values"]


@pytest.mark.parametrize("method", LATE.values(), ids=LATE.keys())
@pytest.mark.parametrize("species", MODELS)
def test_cached_equals_uncached_with_gradients(species: str, method: Method) -> None:
    kit = vision_kit(species)
    adapter = kit.add("a", method, seed=0)
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    trunk = FrozenTrunk.build(kit, "a", images(2))
    assert trunk is not None
    with kit.use("a"):
        rows = trunk.record(images(7, seed=1))
        assert len(rows) == 7
        assert not rows.requires_grad
        results = []
        for out in (trunk.logits(rows[[4, 0, 6]]), image_logits(kit, images(7, seed=1)[[4, 0, 6]])):
            adapter.zero_grad()
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)])
    assert len(results[0]) > 1
    for cached, uncached in zip(*results, strict=True):
        torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=1e-4)


def test_the_cut_is_the_first_changed_block_or_module() -> None:
    kit = vision_kit()
    cuts = {}
    for name, method in LATE.items():
        kit.add(name, method)
        trunk = FrozenTrunk.build(kit, name, images(2))
        assert trunk is not None
        cuts[name] = trunk.cut
    last = "dinov2.encoder.layer.2"
    first = "dinov2.encoder.layer.0"
    assert cuts == {"linear": "classifier", "last": last, "lora": last, "adaptformer": last, "everywhere": first}


def test_the_frozen_part_does_not_run_again() -> None:
    kit = vision_kit()
    kit.add(
        "a",
        PartialFineTuning(last=1),
        heads=heads_of_kind(kit, batchnorm_head),
    )
    trunk = FrozenTrunk.build(kit, "a", images(2))
    assert trunk is not None
    ran: list[str] = []
    for path, module in kit.base.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    with kit.use("a"):
        rows = trunk.record(images(3))
        assert not [path for path in ran if "layer.2" in path]
        ran.clear()
        trunk.logits(rows)
    assert not [path for path in ran if "layer.0" in path or "layer.1" in path or "patch" in path]
    assert not [m for m in kit.base.modules() if "forward" in m.__dict__]


def test_there_is_no_trunk_where_everything_is_trained() -> None:
    kit = vision_kit()
    kit.add("a", FullFineTuning())
    assert FrozenTrunk.build(kit, "a", images(2)) is None


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("species", ["dinov2", "vit", "timm-vit"])
def test_the_trunk_of_prompts_is_the_embeddings(species: str, deep: bool) -> None:
    kit = vision_kit(species)
    adapter = kit.add(
        "a",
        VPT(length=3, deep=deep),
        seed=0,
        heads=heads_of_kind(kit, linear_head),
    )
    trunk = FrozenTrunk.build(kit, "a", images(2))
    assert trunk is not None
    assert trunk.cut == kit.survey.blocks[0].path
    with kit.use("a"):
        trunk.logits(trunk.record(images(3))).sum().backward()
    assert all(value.grad is not None for value in adapter.parameters())


def test_there_is_no_trunk_where_its_blocks_run_again() -> None:
    class Twice(nn.Module):
        """Its first block runs once more after the second."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = vision_kit("timm-vit").detach()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            model = self.inner
            x = model.pos_drop(torch.cat([model.cls_token.expand(len(x), -1, -1), model.patch_embed(x)], dim=1))
            for i in (0, 1, 0, 2):
                x = model.blocks[i](x)
            return model.head(model.norm(x)[:, 0])

    kit = kitout.attach(Twice(), example_batch={"x": images(2)})
    kit.add("last", PartialFineTuning(names="*blocks.1.*"))
    assert FrozenTrunk.build(kit, "last", images(2)) is None
