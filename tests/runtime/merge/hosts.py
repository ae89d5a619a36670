"""A module of any kind before one block: what the tests of merging put their convolutions and linears into.

Nothing in it is at its initial value. It knows torch alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kitout
from kitout import Kit, Method
from kitout.runtime.adapter import Adapter


class Host(nn.Module):
    """`patch`, then a block over its outputs, flattened to positions if it is a convolution."""

    def __init__(self, patch: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.patch, self.norm = patch, norm
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkvo"})])

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.norm(self.patch(pixels))
        if isinstance(self.patch, nn.modules.conv._ConvNd):
            x = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + layer["o"](F.scaled_dot_product_attention(layer["q"](x), layer["k"](x), layer["v"](x)))
        return x


def kit_over(patch: nn.Module, shape: tuple[int, ...], norm: nn.Module | None = None) -> tuple[Kit, Tensor]:
    """A kit of such a host, with random parameters, and an input of this shape. norm: behind the patch."""
    norm = nn.Identity() if norm is None else norm
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*patch.parameters(), *norm.parameters()]:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    x = torch.randn(shape, generator=draw)
    return kitout.attach(Host(patch, norm).eval(), example_batch={"pixels": x}), x


@torch.no_grad()
def untrivial(kit: Kit, name: str, method: Method) -> Adapter:
    """A new adapter whose values are all moved off their start."""
    adapter = kit.add(name, method, seed=0)
    draw = torch.Generator().manual_seed(len(name))
    for parameter in adapter.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return adapter


@torch.no_grad()
def assert_merges(kit: Kit, x: Tensor, name: str) -> None:
    """Merged equals attached at two strengths, in place and in a copy; unmerge restores the bits."""
    bits = {key: value.clone() for key, value in kit.base.state_dict().items()}
    base = kit(x)
    for strength in (1.0, 0.7):
        kit.strength(name, strength)
        with kit.use(name):
            attached = kit(x)
        assert (attached - base).abs().max() > 1e-3, "the adapter does nothing"
        kit.merge(name)
        merged = kit(x)
        kit.unmerge()
        assert_same(merged, attached)
        assert_same(kit.merged_copy(name)(x), attached)
        assert all(torch.equal(value, bits[key]) for key, value in kit.base.state_dict().items())
        assert torch.equal(kit(x), base)
    kit.strength(name, 1.0)


def assert_same(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())
