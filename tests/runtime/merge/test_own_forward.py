"""Modules with a forward of their own: merged by that forward where it is linear, refused by name where it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout import IA3, SSF, BitFit, FullFineTuning, LoRA, Method, Mix
from kitout.errors import NotMergeable, TargetError
from laws.activate import kit_with, run
from runtime.merge.hosts import assert_merges, assert_same, kit_over, untrivial

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=3, alpha=5, targets="*patch"),
    "dora": LoRA(rank=3, alpha=5, dora=True, targets="*patch"),
    "ia3": IA3(targets="*patch in:*patch"),
    "ssf": SSF(targets="*patch"),
    "bitfit": BitFit(targets="*patch"),
    "full": FullFineTuning(targets="*patch"),
}


class PadsToSame(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 1, 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : x.shape[-1]]


class Reversed(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(-1))


class Standardizing(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2), keepdim=True)) / w.std((1, 2), keepdim=True)
        return F.conv1d(F.pad(x, (1, 1)), w, self.bias)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Gate(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gain)


LINEAR = {
    "pads": (lambda: PadsToSame(4, 8, 3, groups=2), (2, 4, 6, 6)),
    "crops": (lambda: Causal(4, 8, 3, padding=2), (2, 4, 8)),
    "flips": (lambda: Reversed(4, 8, 3), (2, 4, 8)),
}


@pytest.mark.parametrize("form", LINEAR)
def test_a_convolution_that_is_linear(form: str) -> None:
    build, shape = LINEAR[form]
    kit, x = kit_over(build(), shape)
    for name, method in METHODS.items():
        untrivial(kit, name, method)
        assert_merges(kit, x, name)
        kit.remove(name)
    untrivial(kit, "shift", SSF(targets="in:*patch"))
    with pytest.raises(NotMergeable, match="a shift of the input is no bias"):
        kit.merge("shift")


def test_one_that_standardizes_its_kernel() -> None:
    kit, x = kit_over(Standardizing(4, 8, 3), (2, 4, 8))
    for name in ("dora", "lora"):
        untrivial(kit, name, METHODS[name])
        with kit.use(name), pytest.raises(TargetError, match=r"patch: Standardizing .*choose a method"):
            kit(x)
    untrivial(kit, "ia3", METHODS["ia3"])
    with pytest.raises(NotMergeable, match="Standardizing is not linear in its weight"):
        kit.merge("ia3")
    untrivial(kit, "full", METHODS["full"])
    with torch.no_grad(), kit.use("full"):
        attached = kit(x)
    kit.merge("full")
    assert_same(kit(x), attached)


@pytest.mark.parametrize(("patch", "is_linear"), [(Gain(), True), (Gate(), False), (Standardizing(4, 8, 3), False)])
def test_a_blend_of_trained_copies(patch: nn.Module, is_linear: bool) -> None:
    """A blend of outputs is the output of blended parameters where the module is linear in them, and only there."""
    kit, x = kit_over(patch, (2, 5, 8) if isinstance(patch, Gain) else (2, 4, 8))
    untrivial(kit, "full", FullFineTuning(targets="*patch"))
    for entry, strength in ((Mix({"full": 0.4}), 1.0), ("full", 0.4), ("full", 1.0)):
        kit.strength("full", strength)
        with torch.no_grad(), kit.use(entry):
            attached = kit(x)
        if is_linear or (entry == "full" and strength == 1.0):
            kit.merge(entry)
            assert_same(kit(x), attached)
            kit.unmerge()
        else:
            with pytest.raises(NotMergeable, match=r"patch .*a blend of two .* is none of them"):
                kit.merge(entry)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)])
def test_a_norm_of_images(norm: nn.Module) -> None:
    kit, x = kit_over(nn.Conv2d(4, 8, 3), (2, 4, 6, 6), norm)
    for name, method in {
        "ssf": SSF(targets="*norm"),
        "bitfit": BitFit(targets="*norm"),
        "ia3": IA3(targets="*norm"),
    }.items():
        untrivial(kit, name, method)
        assert_merges(kit, x, name)


def test_a_table_that_limits_the_rows_it_looks_up() -> None:
    kit, batch = kit_with("bert")
    table = kit.base.get_input_embeddings()
    table.max_norm = 0.5
    kit.add("e", LoRA(rank=2, targets="embed"))
    with pytest.raises(NotMergeable, match="max_norm"):
        kit.merge("e")
    run(kit, batch)
