"""Weights that are no plain linear's: convolutions, tables with a scale, weights that another module reads, ties."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kitout
from fuse.parts import add, change, distance, kit_of
from kitout import IA3, FullFineTuning, Kit, LoRA, Method
from runtime.merge.hosts import kit_over


def assert_sums(kit: Kit, methods: dict[str, Method], tolerance: float = 1e-9) -> None:
    for name, method in methods.items():
        if name not in kit:
            add(kit, name, method)
    weights = dict(zip(methods, (0.7, -0.4), strict=True))
    for to in ("exact", LoRA(rank=2)):
        drop = None if to == "exact" else "biases norms other"
        fused = kitout.combine(kit, "c", weights, to=to, drop=drop)
        assert abs(fused.residual.total - distance(change(kit, {"c": 1}), change(kit, weights))) <= tolerance
        kit.remove("c")


@pytest.mark.parametrize("other", [LoRA(rank=2, targets="in:*patch"), IA3(targets="*patch"), FullFineTuning()])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(4, 8, 3), (2, 4, 9, 9)),
        (lambda: nn.ConvTranspose1d(4, 8, 3, stride=2), (2, 4, 5)),
    ],
    ids=["conv2d", "transposed"],
)
def test_convolutions(make: object, shape: tuple[int, ...], other: Method) -> None:
    """Their path, "patch", reads like a role."""
    kit, _ = kit_over(make(), shape)  # type: ignore[operator]
    assert_sums(kit, {"a": LoRA(rank=3, alpha=5, targets="*patch"), "b": other}, 1e-5)


def test_a_table_with_a_scale_and_a_tie() -> None:
    kit = kit_of("gemma3", {})
    assert_sums(kit, {"a": LoRA(rank=2, targets="embed attn.q"), "b": LoRA(rank=2, targets="head mlp.down")})
    assert_sums(kit, {"full": FullFineTuning(), "ia3": IA3()})
    with pytest.raises(ValueError, match="one tied parameter"):
        kitout.combine(kit, "c", {"a": 1.0, "b": 1.0}, to="dense")


def test_weights_that_another_module_reads() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    kit = kitout.attach(model, example_batch={"src": torch.randn(2, 4, 16, dtype=torch.float64)})
    assert_sums(kit, {"q": LoRA(rank=2, targets="attn.q attn.o"), "qkv": LoRA(rank=2, targets="attn.qkv")})
    assert_sums(kit, {"dora": LoRA(rank=2, dora=True, targets="attn.o attn.q"), "full": FullFineTuning()})


def test_targets_inside_a_fused_projection() -> None:
    """What lies in its other rows is not held, and refused."""
    kit = kit_of("gpt2", {"q": LoRA(rank=3, targets="attn.q"), "qkv": LoRA(rank=3, targets="attn.qkv")})
    fused = kitout.convert(kit, "q", "c", to=LoRA(rank=3, targets="attn.q"))
    assert fused.residual.total <= 1e-9
    assert distance(change(kit, {"c": 1}), change(kit, {"q": 1})) <= 1e-9
    with pytest.raises(ValueError, match=r"c_attn\.weight"):
        kitout.convert(kit, "qkv", "d", to=LoRA(rank=3, targets="attn.q"))


def test_a_table_that_does_more_than_look_up_is_no_matrix() -> None:
    kit = kit_of("bart", {"full": FullFineTuning(), "lora": LoRA(rank=2)})
    weights = {"full": 0.7, "lora": -0.4}
    fused = kitout.combine(kit, "c", weights)
    assert distance(change(kit, {"c": 1}), change(kit, weights)) <= 1e-9
    kit.remove("c")
    fused = kitout.combine(kit, "c", weights, to=LoRA(rank=48), drop="biases norms other")
    assert "other" in fused.dropped.values()
    assert abs(fused.residual.total - distance(change(kit, {"c": 1}), change(kit, weights))) <= 1e-9
