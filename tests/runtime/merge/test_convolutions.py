"""Convolutions of every form merge to the function that the active adapter computes, or say why they cannot."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kitout import IA3, SSF, BitFit, FullFineTuning, LoRA, Method, PartialFineTuning, Stack
from kitout.errors import NotMergeable
from runtime.merge.hosts import assert_merges, assert_same, kit_over, untrivial

CONVOLUTIONS = {
    "plain": (lambda: nn.Conv1d(8, 8, 3, bias=False), (2, 8, 9)),
    "grouped": (lambda: nn.Conv1d(8, 8, 3, groups=2, padding=1), (2, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, stride=2), (2, 8, 9, 9)),
    "dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=8), (2, 4, 20, 20)),
    "circular": (lambda: nn.Conv1d(4, 8, 3, padding=2, padding_mode="circular", groups=4), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(4, 8, 3, groups=2, padding="same"), (2, 4, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 8, 3, stride=2, dilation=2), (2, 4, 5)),
    "transposed-grouped": (
        lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2, padding=1, output_padding=1),
        (2, 4, 5, 5),
    ),
}
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=3, alpha=5, targets="*patch"),
    "lora-1": LoRA(rank=1, alpha=3, targets="*patch"),
    "dora": LoRA(rank=3, alpha=5, dora=True, targets="*patch"),
    "pissa": LoRA(rank=2, init="pissa", targets="*patch"),
    "lora-in": LoRA(rank=2, alpha=3, targets="in:*patch"),
    "ia3": IA3(targets="*patch"),
    "ia3-in": IA3(targets="in:*patch"),
    "ssf": SSF(targets="*patch"),
    "ssf-in": SSF(targets="in:*patch"),
    "bitfit": BitFit(targets="*patch"),
    "full": FullFineTuning(),
    "partial": PartialFineTuning(names="patch*"),
}


def refusal(patch: nn.modules.conv._ConvNd, method: str) -> str:
    """Why the method cannot merge there, by mathematics; "" where it can."""
    if method == "lora-in" and patch.groups > 1:
        return f"no place in a convolution of {patch.groups} groups"
    padded = patch.padding_mode == "zeros" and any(patch._reversed_padding_repeated_twice)
    if method == "ssf-in" and (padded or isinstance(patch, nn.modules.conv._ConvTransposeNd)):
        return "a shift of the input is no bias at the edges"
    return ""


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_merged_equals_attached(form: str) -> None:
    build, shape = CONVOLUTIONS[form]
    patch = build()
    kit, x = kit_over(patch, shape)
    for name, method in METHODS.items():
        untrivial(kit, name, method)
        if reason := refusal(patch, name):
            with pytest.raises(NotMergeable, match=reason):
                kit.merge(name)
        else:
            assert_merges(kit, x, name)
        kit.remove(name)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_grouped_low_rank_change_is_that_of_its_product(rank: int) -> None:
    """By groups or as a whole, whichever is less work: both are the convolution by B A."""
    patch = nn.Conv1d(8, 8, 3, groups=4, padding=1)
    kit, x = kit_over(patch, (2, 8, 9))
    delta = untrivial(kit, "a", LoRA(rank=rank, alpha=5, targets="*patch")).deltas["patch"]
    kernel = (5 / rank * delta.b @ delta.a).view_as(patch.weight)
    with kit.use("a"):
        change = kit.base.patch(x) - F.conv1d(x, patch.weight, patch.bias, padding=1, groups=4)
    assert_same(change, F.conv1d(x, kernel, padding=1, groups=4))


def test_a_transposed_convolution_called_for_another_size() -> None:
    patch = nn.ConvTranspose1d(8, 8, 3, stride=2)
    kit, x = kit_over(patch, (2, 8, 5))
    untrivial(kit, "a", LoRA(rank=2, alpha=5, targets="*patch"))
    with torch.no_grad(), kit.use("a"):
        attached = kit.base.patch(x, output_size=[12])
    kit.merge("a")
    assert_same(kit.base.patch(x, output_size=[12]), attached)


def test_two_ends_and_two_adapters() -> None:
    kit, x = kit_over(nn.Conv1d(4, 8, 3, groups=2), (2, 4, 9))
    untrivial(kit, "a", IA3(targets="*patch in:*patch"))
    untrivial(kit, "b", LoRA(rank=2, alpha=5, dora=True, targets="*patch"))
    for order in (("a", "b"), ("b", "a")):
        with torch.no_grad(), kit.use(Stack(*order)):
            attached = kit(x)
        kit.merge(*order)
        assert_same(kit(x), attached)
        kit.unmerge()


def test_a_transposed_convolution_with_trained_parameters_too() -> None:
    """Trained copies are swapped in before an output is changed, whatever the order."""
    kit, x = kit_over(nn.ConvTranspose1d(4, 8, 3, groups=2), (2, 4, 9))
    untrivial(kit, "full", FullFineTuning())
    untrivial(kit, "ia3", IA3(targets="*patch in:*patch"))
    for order in (("full", "ia3"), ("ia3", "full")):
        with torch.no_grad(), kit.use(Stack(*order)):
            attached = kit(x)
        kit.merge(*order)
        assert_same(kit(x), attached)
        kit.unmerge()
