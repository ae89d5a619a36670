"""Law 3: only an adapter's own parameters get gradients, none is structurally dead, two steps change every one.

What mathematics makes inert (`activate.inert`) must be so and nothing else: the rule is tested in both directions.
"""

from __future__ import annotations

import pytest
import torch

from kitout import LoRA
from kitout.runtime.adapter import Adapter
from laws.activate import activated, gradients, inert, kit_of, loss_of, untrivial
from laws.cases import TRAINED, Case, name_of
from zoo import Specimen

NOTHING = 1e-6  # of the largest gradient: what rounding leaves of a zero

cells = pytest.mark.parametrize(("specimen", "case"), TRAINED, ids=name_of)


def inert_names(adapter: Adapter, specimen: Specimen) -> set[str]:
    return {
        f"deltas.{site.key}.{n}"
        for site in adapter.sites
        for n, _ in adapter.delta(site).named_parameters()
        if inert(site, n, specimen)
    }


@cells
def test_two_steps_change_every_tensor_and_nothing_else(specimen: Specimen, case: Case) -> None:
    kit, batch = kit_of(specimen), specimen.batch(3, 0)
    with activated(kit, case, fresh=True) as adapter:
        kit.train()
        bystander = kit.add("bystander", LoRA(rank=2), seed=1)
        start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        assert all(p.requires_grad for p in adapter.parameters())
        optimiser = torch.optim.SGD(adapter.parameters(), lr=0.05)
        for step in range(2):
            optimiser.zero_grad()
            loss_of(kit(**batch), seed=step).backward()
            optimiser.step()
        assert all(p.grad is None and not p.requires_grad for p in kit.base.parameters())
        assert all(p.grad is None for p in bystander.parameters())
        still = {n for n, p in adapter.named_parameters() if torch.equal(p, start[n])}
        assert still <= inert_names(adapter, specimen), "two steps of SGD left tensors as they were"
        assert all(p.isfinite().all() for p in adapter.parameters())


@cells
def test_gradients_vanish_where_mathematics_says_so_and_nowhere_else(specimen: Specimen, case: Case) -> None:
    kit, batch = kit_of(specimen), specimen.batch(3, 0)
    with activated(kit, case, fresh=True) as adapter:
        untrivial(adapter)
        loss_of(kit(**batch)).backward()
        size = {n: g.abs().max().item() for n, g in gradients(adapter).items()}
        limit = NOTHING * max(size.values())
        assert {n for n, g in size.items() if g <= limit} == inert_names(adapter, specimen)


def test_train_only_says_what_is_trained(specimen: Specimen) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    try:
        a, b = kit.add("a", LoRA(rank=2), seed=0), kit.add("b", LoRA(rank=2), seed=1)
        for adapter in (a, b):
            untrivial(adapter)
        kit.train_only("b")
        with kit.use(["a", "b"]):
            loss_of(kit(**batch)).backward()
        assert all(p.grad is None and not p.requires_grad for p in a.parameters())
        assert all(p.grad is not None and p.grad.any() for p in b.parameters())
        kit.train_only()
        assert not any(p.requires_grad for p in kit.parameters())
    finally:
        for name in kit.names:
            kit.remove(name)
