"""What is kept of the frozen trunk gives the logits and gradients of the whole model, whatever the model and method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kitout import VPT, AdaptFormer, FullFineTuning, Kit, LoRA, PartialFineTuning
from kitout.method import Method
from kitout.train.loop.frozen_trunk import FrozenTrunk
from kitout.train.objectives.image_classification import image_logits
from kitout.train.setup.heads import batchnorm_head, linear_head
from tiny_vision import kit
from zoo import image_batch

MODELS = ["dinov2", "vit", "swin", "timm-vit"]
LATE: dict[str, Method] = {
    "linear": PartialFineTuning(part="head"),
    "last": PartialFineTuning(last=1),
    "lora": LoRA(rank=2, targets="attn.o mlp.down", layers="last:1"),
    "adaptformer": AdaptFormer(layers="last:1", dropout=0.0),
    "everywhere": LoRA(rank=2),
}


def heads_of_kind(worn: Kit, make: Callable[[int, int], nn.Module]) -> dict[str, nn.Module]:
    return {site.path: make(site.d_in, 5) for site in worn.survey.sites if site.role == "head"}


def images(rows: int, seed: int = 0) -> torch.Tensor:
    return image_batch(rows, seed)["pixel_values"]


@pytest.mark.parametrize("method", LATE.values(), ids=LATE.keys())
@pytest.mark.parametrize("species", MODELS)
def test_cached_equals_uncached_with_gradients(species: str, method: Method) -> None:
    worn = kit(species)
    adapter = worn.add("a", method, seed=0)
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    trunk = FrozenTrunk.build(worn, "a", images(2))
    assert trunk is not None
    with worn.use("a"):
        rows = trunk.record(images(7, seed=1))
        assert len(rows) == 7
        assert not rows.requires_grad
        found = []
        for out in (trunk.logits(rows[[4, 0, 6]]), image_logits(worn, images(7, seed=1)[[4, 0, 6]])):
            adapter.zero_grad()
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)])
    assert len(found[0]) > 1
    for cached, whole in zip(*found, strict=True):
        torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-4)


def test_the_trunk_is_what_lies_below_and_no_more() -> None:
    worn = kit()
    cuts = {}
    for name, method in LATE.items():
        worn.add(name, method)
        trunk = FrozenTrunk.build(worn, name, images(2))
        assert trunk is not None
        cuts[name] = trunk.cut
    last = "dinov2.encoder.layer.2"
    first = "dinov2.encoder.layer.0"
    assert cuts == {"linear": "classifier", "last": last, "lora": last, "adaptformer": last, "everywhere": first}


def test_the_frozen_part_does_not_run_again() -> None:
    worn = kit()
    worn.add(
        "a",
        PartialFineTuning(last=1),
        heads=heads_of_kind(worn, batchnorm_head),
    )
    trunk = FrozenTrunk.build(worn, "a", images(2))
    assert trunk is not None
    ran: list[str] = []
    for path, module in worn.base.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    with worn.use("a"):
        rows = trunk.record(images(3))
        assert not [path for path in ran if "layer.2" in path]
        ran.clear()
        trunk.logits(rows)
    assert not [path for path in ran if "layer.0" in path or "layer.1" in path or "patch" in path]
    assert not [m for m in worn.base.modules() if "forward" in m.__dict__]


def test_there_is_no_trunk_below_what_trains_from_the_start() -> None:
    worn = kit()
    worn.add("a", FullFineTuning())
    assert FrozenTrunk.build(worn, "a", images(2)) is None


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("species", ["dinov2", "vit", "timm-vit"])
def test_below_prompts_lie_the_embeddings_alone(species: str, deep: bool) -> None:
    worn = kit(species)
    adapter = worn.add(
        "a",
        VPT(length=3, deep=deep),
        seed=0,
        heads=heads_of_kind(worn, linear_head),
    )
    trunk = FrozenTrunk.build(worn, "a", images(2))
    assert trunk is not None
    assert trunk.cut == worn.survey.blocks[0].path
    with worn.use("a"):
        trunk.logits(trunk.record(images(3))).sum().backward()
    assert all(value.grad is not None for value in adapter.parameters())


def test_there_is_no_trunk_where_blocks_run_again() -> None:
    class Twice(nn.Module):
        """Its first block runs once more after the second."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = kit("timm-vit").detach()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            model = self.inner
            x = model.pos_drop(torch.cat([model.cls_token.expand(len(x), -1, -1), model.patch_embed(x)], dim=1))
            for i in (0, 1, 0, 2):
                x = model.blocks[i](x)
            return model.head(model.norm(x)[:, 0])

    import kitout

    worn = kitout.attach(Twice(), example_batch={"x": images(2)})
    worn.add("last", PartialFineTuning(names="*blocks.1.*"))
    assert FrozenTrunk.build(worn, "last", images(2)) is None
