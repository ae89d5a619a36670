"""Recomputation of activations: under the strength that the forward had."""

from __future__ import annotations

import torch

from kitout import IA3
from laws.activate import kit_with
from zoo import out


def test_recomputation_at_the_strength_of_its_forward() -> None:
    def grads(after: float | None) -> list[torch.Tensor]:
        kit, batch = kit_with("llama", i=IA3())
        kit.train()
        kit.gradient_checkpointing_enable()
        kit.strength("i", 0.7)
        kit.use("i")
        loss = out(kit(**batch, use_cache=False)).square().mean()
        if after is not None:
            kit.strength("i", after)
        loss.backward()
        return [p.grad for p in kit["i"].parameters() if p.grad is not None]

    for a, b in zip(grads(None), grads(0.1), strict=True):
        assert torch.equal(a, b)
