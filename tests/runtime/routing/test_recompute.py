"""Recomputation of activations: under the strength that the forward had, and from several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kitout
from kitout import IA3, Kit, LoRA, PromptTuning
from kitout.errors import RouteError
from laws.activate import fresh_kit, kit_with, loss_of, put_on, run
from laws.test_11_recomputation import recomputing
from zoo import ZOO, out


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


METHODS = {"a": LoRA(rank=2, targets="attn.* mlp.*"), "b": LoRA(rank=3, targets="attn.o"), "s": IA3()}
ROUNDS = 5


def gradient(kit: Kit, name: str, loss: Tensor) -> Tensor:
    """Of one adapter, which nobody else trains."""
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in kit[name].parameters() if p.grad is not None])
    kit[name].zero_grad()
    return found


def assert_right_from_threads(kit: Kit, forward: Callable[[], Tensor]) -> None:
    """Each adapter trained in a thread of its own, beside one that only answers, as if it were alone."""

    def loss(name: str) -> Tensor:
        with kit.use(name):
            return loss_of(forward())

    want = {name: gradient(kit, name, loss(name)) for name in kit.names}
    gate, wrong = threading.Barrier(len(kit.names)), []
    stop = threading.Event()

    def train(name: str) -> None:
        try:
            gate.wait(30)
            for _ in range(ROUNDS):
                found = gradient(kit, name, loss(name))
                if not torch.allclose(found, want[name], atol=1e-5 * want[name].abs().max().item()):
                    wrong.append(f"{name} by {(found - want[name]).abs().max().item():.1e}")
        except Exception as error:
            wrong.append(f"{name} raised {error!r}")

    def answer() -> None:
        while not stop.is_set():
            with torch.no_grad(), kit.use("a"):
                forward()

    threads = [threading.Thread(target=train, args=(name,)) for name in kit.names]
    beside = threading.Thread(target=answer)
    for thread in (*threads, beside):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    beside.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in (*threads, beside)), "a thread hangs"


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["llama", "timm-vit", "t5"])
def test_trained_from_several_threads(name: str, kind: str) -> None:
    kit, batch = fresh_kit(ZOO[name]), ZOO[name].batch(2, 0)
    for seed, (adapter, method) in enumerate(METHODS.items()):
        put_on(kit, method, adapter, seed=seed)
    if name == "llama":
        put_on(kit, PromptTuning(length=3), "prompt")
    kit.train()
    with recomputing(kit, ZOO[name], kind):
        assert_right_from_threads(kit, lambda: kit(**batch))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_model_that_calls_torchs_checkpoint(use_reentrant: bool) -> None:
    model = ZOO["timm-vit"].build()
    kit = kitout.attach(model)
    for seed, (adapter, method) in enumerate(METHODS.items()):
        put_on(kit, method, adapter, seed=seed)
    kit.train()

    def recomputed(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant) if torch.is_grad_enabled() else block(x)
        return x

    model.blocks.forward = recomputed
    batch = ZOO["timm-vit"].batch(2, 0)
    images = next(iter(batch.values())).requires_grad_()
    assert_right_from_threads(kit, lambda: kit(images))


def test_the_whole_model_run_again_under_another_route() -> None:
    kit, batch = kit_with("llama", a=LoRA(rank=2), b=LoRA(rank=2))

    def whole(ids: Tensor) -> Tensor:
        return out(kit(ids))

    with kit.use("a"):
        loss_of(whole(batch["input_ids"])).backward()
        want = [p.grad.clone() for p in kit["a"].parameters()]
        kit.zero_grad()
        loss = loss_of(checkpoint(whole, batch["input_ids"], use_reentrant=False))
        loss.backward()
        assert all(torch.equal(p.grad, w) for p, w in zip(kit["a"].parameters(), want, strict=True))
        loss = loss_of(checkpoint(whole, batch["input_ids"], use_reentrant=False))
    with pytest.raises(RouteError, match=r"inside a backward pass under None.*under 'a'"):
        loss.backward()


def test_a_call_inside_a_backward_pass() -> None:
    """Of a teacher, without gradients, under a route of its own."""
    kit, batch = kit_with("llama", a=LoRA(rank=2), b=LoRA(rank=2))
    with kit.use("b"):
        want = run(kit, batch)
    found: list[Tensor] = []

    def ask(_: Tensor) -> None:
        with kit.use("b"):
            found.append(run(kit, batch))

    with kit.use("a"):
        logits = out(kit(**batch))
    logits.register_hook(ask)
    loss_of(logits).backward()
    assert torch.equal(found[0], want)
