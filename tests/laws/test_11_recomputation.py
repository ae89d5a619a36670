"""Law 11: gradients are the same under activation checkpointing, whoever runs backward and whatever is active by then.

The route of a forward is that of its recomputation: after the `with` has ended, in another thread, and with a second
forward under another adapter in between, gradients are right.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kitout import Kit, LoRA
from kitout.runtime.adapter import Adapter
from laws.activate import TOLERANCE, activated, added, assert_same, gradients, kit_of, loss_of, untrivial
from laws.cases import COSTLY, Case, name_of
from zoo import Specimen

KINDS = ("reentrant", "non-reentrant")


def checkpoints(specimen: Specimen) -> bool:
    base = kit_of(specimen).base
    return getattr(base, "supports_gradient_checkpointing", False) or hasattr(base, "set_grad_checkpointing")


@contextmanager
def recomputing(kit: Kit, specimen: Specimen, kind: str) -> Iterator[None]:
    """Activation checkpointing, transformers' or timm's.

    Reentrant wants an input that requires grad: what a block is fed with.
    """
    base = kit.base
    handles = [m.register_forward_pre_hook(fed_with_gradient) for m in entrances(kit)]
    try:
        if hasattr(base, "set_grad_checkpointing"):
            base.set_grad_checkpointing(True)
        else:
            kit.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            assert any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
        yield
    finally:
        for handle in handles:
            handle.remove()
        if hasattr(base, "set_grad_checkpointing"):
            base.set_grad_checkpointing(False)
        else:
            kit.gradient_checkpointing_disable()
            base.disable_input_require_grads()


def entrances(kit: Kit) -> list[torch.nn.Module]:
    """What is recomputed as one: blocks, and stages of blocks."""
    return [m for m in kit.base.modules() if hasattr(type(m), "gradient_checkpointing")]


def fed_with_gradient(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
    args[0].requires_grad_()


def step(kit: Kit, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)  # dropout draws the same numbers each time
    return loss_of(kit(**batch))


# In float32, of the largest gradient, where sums come in another order and attention is not scaled; in float64 these
# are 2e-15 apart. Everywhere else the laws' own.
ROUNDING = {"t5": 3e-5}


def assert_equal_gradients(specimen: Specimen, adapter: Adapter, want: dict[str, Tensor]) -> None:
    scale = max(g.abs().max().item() for g in want.values())
    assert scale > 0
    for name, gradient in gradients(adapter).items():
        tolerance = ROUNDING.get(specimen.name, TOLERANCE)
        assert_same(gradient / scale, want[name] / scale, tolerance, f"gradient of {name}")


cells = pytest.mark.parametrize(
    ("specimen", "case"), [c for c in COSTLY if c[1].trains and checkpoints(c[0])], ids=name_of
)


@cells
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_recomputation(specimen: Specimen, case: Case, kind: str) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    with activated(kit, case) as adapter:
        kit.train()
        step(kit, batch).backward()
        want = gradients(adapter)
        with recomputing(kit, specimen, kind):
            kit.zero_grad()
            step(kit, batch).backward()
            assert_equal_gradients(specimen, adapter, want)

            kit.zero_grad()
            with kit.use(case.name):
                loss = step(kit, batch)
            with added_beside(kit), kit.use("beside"):
                loss.backward()
            assert_equal_gradients(specimen, adapter, want)

            kit.zero_grad()
            loss = step(kit, batch)
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
            assert_equal_gradients(specimen, adapter, want)


@cells
@pytest.mark.parametrize("kind", KINDS)
def test_two_forwards_then_both_backwards(specimen: Specimen, case: Case, kind: str) -> None:
    kit, batch, other = kit_of(specimen), specimen.batch(2, 0), Case("other", LoRA(rank=2, targets="attn.o"))
    with added(kit, case, other) as names:
        kit.train()
        want = {}
        for name in names:
            with kit.use(name):
                step(kit, batch).backward()
            want[name] = gradients(kit[name])
        with recomputing(kit, specimen, kind):
            kit.zero_grad()
            losses = []
            for name in names:
                with kit.use(name):
                    losses.append(step(kit, batch))
            losses[0].backward()
            losses[1].backward()
            for name in names:
                assert_equal_gradients(specimen, kit[name], want[name])

            kit.zero_grad()
            both = []
            for name in names:
                with kit.use(name):
                    both.append(step(kit, batch))
            torch.stack(both).sum().backward()
            for name in names:
                assert_equal_gradients(specimen, kit[name], want[name])


@contextmanager
def added_beside(kit: Kit) -> Iterator[None]:
    """One more adapter everywhere, whose presence in a recomputation would be noticed."""
    untrivial(kit.add("beside", LoRA(rank=2, targets="all-linear"), seed=5))
    try:
        yield
    finally:
        kit.remove("beside")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_recomputed_as_they_were(specimen: Specimen, kind: str) -> None:
    if not checkpoints(specimen):
        return
    kit, batch = kit_of(specimen), specimen.batch(3, 0)
    one, two = (Case(n, LoRA(rank=2, targets="attn.* mlp.*")) for n in ("one", "two"))
    with added(kit, one, two) as names:
        kit.train()
        rows = ["one", None, "two"]
        with kit.use(rows):
            step(kit, batch).backward()
        want = {n: gradients(kit[n]) for n in names}
        with recomputing(kit, specimen, kind):
            kit.zero_grad()
            with kit.use(rows):
                loss = step(kit, batch)
            loss.backward()
        for n in names:
            assert_equal_gradients(specimen, kit[n], want[n])


def test_after_a_backward_the_next_forward_may_use_another(specimen: Specimen) -> None:
    """What one step leaves behind must not make the next one look ambiguous."""
    if not checkpoints(specimen):
        return
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    one, two = (Case(n, LoRA(rank=2, targets="attn.o")) for n in ("one", "two"))
    with added(kit, one, two) as names:
        kit.train()
        with recomputing(kit, specimen, "non-reentrant"):
            for name in (*names, *names):
                kit.zero_grad()
                with kit.use(name):
                    loss = step(kit, batch)
                loss.backward()
                assert all(p.grad is not None and p.grad.any() for p in kit[name].parameters())
