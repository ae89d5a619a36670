"""What stands on top of an image model: a linear head, or BatchNorm without gain and shift before it.

Made for the place where the model's own head stands and as wide as the features it reads, to travel with an adapter:
`kit.add(name, method, heads=linear(kit, 10))`. It knows heads and no loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kitout.base.site import Site
from kitout.errors import TargetError
from kitout.kit import Kit

Heads = dict[str, nn.Module]


def head_site(kit: Kit) -> Site:
    """The one linear head of the model; TargetError where there is none or more than one."""
    found = [s for s in kit.survey.sites if s.role == "head"]
    if len(found) != 1 or found[0].kind != "linear":
        told = ", ".join(f"{s.path} ({s.kind})" for s in found) or "none"
        raise TargetError(
            f"one linear head is expected, found {told}; give the adapter's heads={{path: module}} yourself"
        )
    return found[0]


def linear(kit: Kit, classes: int, seed: int = 0) -> Heads:
    """nn.Linear as transformers starts its classifiers: N(0, 0.02), no bias at first."""

    def make(width: int) -> nn.Module:
        layer = nn.Linear(width, classes)
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer

    return _made(kit, seed, make)


def batchnorm(kit: Kit, classes: int, seed: int = 0) -> Heads:
    """BatchNorm1d(affine=False, eps=1e-6), then a linear from a truncated N(0, 0.01).

    AdaptFormer's head (code ShoufaChen/AdaptFormer, main_image.py), after MAE's and MoCo v3's probes.
    """

    def make(width: int) -> nn.Module:
        layer = nn.Linear(width, classes)
        nn.init.trunc_normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), layer)

    return _made(kit, seed, make)


def _made(kit: Kit, seed: int, make: Callable[[int], nn.Module]) -> Heads:
    site = head_site(kit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {site.path: make(site.d_in)}
