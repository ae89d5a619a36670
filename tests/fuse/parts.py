"""What the tests of fusion measure with: adapters moved off their start, and their changes as folded weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import kitout
from kitout import Kit, Method
from kitout.runtime.merge.fold import fold_all
from zoo import EXTRA, ZOO

Weights = dict[str, Tensor]


def kit_of(species: str, methods: Mapping[str, Method], dtype: torch.dtype = torch.float64) -> Kit:
    """A kit of the zoo with these adapters, all values moved off their start."""
    kit = kitout.attach({**ZOO, **EXTRA}[species].build().to(dtype).eval())
    for name, method in methods.items():
        add(kit, name, method)
    return kit


@torch.no_grad()
def add(kit: Kit, name: str, method: Method) -> None:
    adapter = kit.add(name, method, seed=0)
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    for parameter in adapter.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


@torch.no_grad()
def change(kit: Kit, weights: Mapping[str, float]) -> Weights:
    """The weighted sum of what adapters change, by parameter, from their folds."""
    parameters = dict(kit.base.named_parameters(remove_duplicate=False))
    total: Weights = {}
    for name, weight in weights.items():
        for path, folded in fold_all({each: kit[each] for each in kit.names}, name, kit.state.survey).items():
            for key, value in folded.parameters.items():
                full = f"{path}.{key}" if path else key
                old = parameters.get(full)
                difference = value if old is None else value - old
                total[full] = total.get(full, 0) + weight * difference
    return total


def distance(found: Weights, expected: Weights) -> float:
    """Norm of the difference over the norm of what is expected."""
    zero = torch.zeros(())
    missing = sum(float((found.get(k, zero) - expected.get(k, zero)).square().sum()) for k in {**found, **expected})
    return (missing / sum(float(v.square().sum()) for v in expected.values())) ** 0.5
