"""Batches, a loss and dense gradients of models of the zoo, for comparison with what probes see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kitout
from kitout.base.weights import to_matrix
from zoo import ZOO, out


def kit_of(name: str) -> kitout.Kit:
    return kitout.attach(ZOO[name].build())


def batches_of(name: str, num: int = 3, rows: int = 4) -> list[dict[str, Tensor]]:
    return [ZOO[name].batch(rows, seed) for seed in range(num)]


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return out(model(**batch)).float().square().mean()


def modules_at(name: str, paths: list[str]) -> dict[str, nn.Module]:
    model = ZOO[name].build().eval()
    return {path: model.get_submodule(path) for path in paths}


def dense_gradients(name: str, paths: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[d_out, d_in] by path: of the sum of the batches' losses."""
    model = ZOO[name].build().eval().requires_grad_(False)
    modules = {path: model.get_submodule(path) for path in paths}
    for module in modules.values():
        module.weight.requires_grad_(True)
    for batch in batches:
        loss(model, batch).backward()
    return {path: to_matrix(module, module.weight.grad) for path, module in modules.items()}


def inputs_at(name: str, path: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """[n, d_in]: everything that a module reads."""
    model = ZOO[name].build().eval()
    rows: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in rows])
