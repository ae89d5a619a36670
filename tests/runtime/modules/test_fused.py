"""LoRAs of one Mix, or neighbors in a Stack, are one product per site: the same values and gradients, never stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, BitFit, Composition, Kit, LoRA, Mix, Mixture, Only, Stack
from kitout.methods.deltas.low_rank import LowRankDelta, LowRankSum
from kitout.runtime.modules.programs import DirectDelta
from kitout.runtime.routing import compile as compiling
from laws.activate import assert_same, gradients, kit_with, loss_of, run

METHODS = {
    "a": LoRA(rank=2, alpha=3, targets="all-linear"),
    "b": LoRA(rank=3, rslora=True, targets="all-linear"),
    "pissa": LoRA(rank=2, init="pissa", targets="attn.q mlp.*"),
    "embed": LoRA(rank=2, targets="embed attn.q"),
    "embed-too": LoRA(rank=3, targets="embed mlp.*"),
    "shifted": LoRA(rank=2, lora_bias=True, targets="attn.q"),
    "bias": BitFit(targets="attn.* mlp.*"),
    "gain": IA3(targets="attn.v in:mlp.down"),
    "dropped": LoRA(rank=2, dropout=0.4, targets="all-linear"),
}
ENTRIES = (
    Mix({"a": 0.7, "b": -0.4}),
    Stack("a", "b", "pissa"),
    Stack("a", Mix({"b": 0.5, "pissa": 2.0}), "a"),
    Mix({"a": 0.7, "gain": 0.5, "b": -0.4, "shifted": 0.3, "bias": 0.2}),
    Mix({Stack("a", "b"): 0.5, Stack("gain", "pissa", "a"): -0.5}),
    Mix({"embed": 0.5, "embed-too": 0.8}),
    Stack("bias", "a", "b", "gain", "embed", "embed-too"),
    Mix({"a": 0.5}),
    Mix({"dropped": 0.5, "a": 0.8}),
)


def exact_kit(specimen: str, **methods: Any) -> tuple[Kit, dict[str, Tensor]]:
    kit, batch = kit_with(specimen, **methods)
    for module in (kit.base, *(kit[name] for name in kit.names)):
        module.double()
    return kit.eval(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def unfused(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit compiles its routes anew, without joining anything."""
    monkeypatch.setattr(compiling, "fuse", lambda term: term)
    for name in kit.names:
        kit.strength(name, kit[name].strength)


@pytest.mark.parametrize("specimen", ["llama", "gpt2"])  # gpt2: channels of a fused projection
def test_values_and_gradients_are_those_of_the_parts(specimen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kit, batch = exact_kit(specimen, **METHODS)
    kit.strength("b", 0.6)
    seen = []
    for is_fused in (True, False):
        if not is_fused:
            unfused(kit, monkeypatch)
        for entry in ENTRIES:
            kit.zero_grad()
            with kit.use(entry):
                value = run(kit, batch)
                loss_of(kit(**batch)).backward()
            seen.append((value, {name: gradients(kit[name]) for name in kit.names}))
    for i, entry in enumerate(ENTRIES):
        (value, grads), (want, want_grads) = seen[i], seen[i + len(ENTRIES)]
        assert_same(value, want, 1e-12, str(entry))
        for name in kit.names:
            for key, gradient in want_grads[name].items():
                assert_same(grads[name][key], gradient, 1e-9, f"{name} {key} in {entry}")


def test_where_all_are_loras_one_delta_runs() -> None:
    kit, batch = exact_kit("llama", a=METHODS["a"], b=METHODS["b"], dropped=METHODS["dropped"])
    for entry in (Mix({"a": 0.5, "b": 0.5, "dropped": 0.1}), Stack("a", Mix({"b": 0.5}), "dropped")):
        with kit.use(entry):
            for site in kit["a"].sites:
                program = site.module._kitout_hook.program
                assert type(program) is DirectDelta
                assert type(program.delta) is LowRankSum
    assert run(kit, batch).isfinite().all()


MIXTURES = {
    "model": Mixture(of=("a", "b", "pissa"), init=(0.7, -0.4, 0.3)),
    "layer": Mixture(of=("embed", "a"), per="layer", softmax=True, init=(0.3, 0.7)),
    "site": Mixture(of=("shifted", "dropped"), per="site"),  # not all are plain LoRAs
    "route": Composition(route=Stack("a", Mix({"b": 0.5}))),
    "nested": Mixture(of=("model", "route", "b"), per="layer", init=(0.5, 1.2, -0.3)),
    "only": Composition(route=Only("model", layers="last:1")),
    "scaled": Mixture(of=("a", "gain")),
}
OF_MIXTURES = (
    *(name for name in MIXTURES if name != "route"),  # which trains nothing
    Mix({"model": 0.5, "a": 0.2, "layer": 0.4}),
    Stack("layer", "gain", Mix({"nested": 0.5, "dropped": 0.2})),
)


@pytest.mark.parametrize("specimen", ["llama", "gpt2"])
def test_a_mixture_and_the_gradients_of_its_weights(specimen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kit, batch = exact_kit(specimen, **METHODS, **MIXTURES)
    for name in MIXTURES:
        kit[name].requires_grad_(True)  # parts, too
    kit.strength("model", 0.8)
    kit.strength("b", 0.6)
    seen = []
    for is_fused in (True, False):
        if not is_fused:
            unfused(kit, monkeypatch)
        for entry in OF_MIXTURES:
            kit.zero_grad()
            with kit.use(entry):
                value = run(kit, batch)
                loss_of(kit(**batch)).backward()
            seen.append((value, {n: {k: p.grad for k, p in kit[n].named_parameters()} for n in MIXTURES}))
    moved = set()
    for i, entry in enumerate(OF_MIXTURES):
        (value, grads), (want, want_grads) = seen[i], seen[i + len(OF_MIXTURES)]
        assert_same(value, want, 1e-12, str(entry))
        for name in MIXTURES:
            for key, gradient in want_grads[name].items():
                assert (grads[name][key] is None) == (gradient is None)
                if gradient is not None:
                    assert_same(grads[name][key], gradient, 1e-9, f"{name} {key} in {entry}")
                    moved.add(name)
    assert moved == {name for name, method in MIXTURES.items() if isinstance(method, Mixture)}


def test_a_mixture_of_loras_is_one_delta_and_is_never_stale() -> None:
    kit, batch = exact_kit("llama", a=METHODS["a"], dropped=METHODS["dropped"], m=Mixture(of=("a", "dropped")))
    with kit.use("m"):
        programs = [site.module._kitout_hook.program for site in kit["a"].sites]
        assert {type(program) for program in programs} == {DirectDelta}
        assert {type(program.delta) for program in programs} == {LowRankSum}
        for weights in ((0.7, -0.4), (0.2, 0.9)):
            with torch.no_grad():
                next(kit["m"].parameters()).copy_(torch.tensor(weights, dtype=torch.float64))
            with kit.use(Mix(dict(zip(("a", "dropped"), weights, strict=True)))):
                want = run(kit, batch)
            assert_same(run(kit, batch), want, 1e-12)
        kit.train()  # each part with its own dropout, and gradients all the same
        loss_of(kit(**batch)).backward()
        assert all(p.grad is not None and p.grad.all() for p in kit["m"].parameters())
        kit.eval()
        found = kitout.attention(kit, "m", batch)
        assert_same(found.weights[:, 0, 0, 0].double(), torch.tensor(weights).double(), 1e-7)
        assert_same(run(kit, batch), want, 1e-12)
        assert type(kit["a"].sites[0].module._kitout_hook.program) is DirectDelta


CHANGES: dict[str, Callable[[Kit], object]] = {
    "in place": lambda kit: [p.detach().mul_(1.5) for p in kit["a"].parameters()],
    "data": lambda kit: [p.data.mul_(1.5) for p in kit["a"].parameters()],
    "new data": lambda kit: [setattr(p, "data", p.data * 1.5) for p in kit["a"].parameters()],
    "loaded": lambda kit: kit["a"].load_state_dict({k: 1.5 * v for k, v in kit["a"].state_dict().items()}),
    "replaced": lambda kit: kit["a"].load_state_dict(
        {k: nn.Parameter(1.5 * v) for k, v in kit["a"].state_dict().items()}, assign=True
    ),
    "strength": lambda kit: kit.strength("a", 1.7),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_what_changes_between_calls_is_seen(change: str, inference: bool) -> None:
    kit, batch = exact_kit("llama", a=METHODS["a"], b=METHODS["b"])
    kit.use(Mix({"a": 0.5, "b": 0.5}))
    with torch.inference_mode(inference):
        before = run(kit, batch)
        for _ in range(2):
            CHANGES[change](kit)
            now = run(kit, batch)
            assert not torch.allclose(now, before)
            kit.merge(Mix({"a": 0.5, "b": 0.5}))
            assert_same(now, run(kit, batch), 1e-12)
            kit.unmerge()


def test_dropout_is_that_of_each_part() -> None:
    kit, batch = exact_kit("llama", a=METHODS["a"], b=METHODS["dropped"])
    kit.use(Mix({"a": 0.5, "b": 0.5}))
    still = run(kit, batch)
    kit.train()
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        output = kit(**batch)
        loss_of(output).backward()
        values.append(output.logits.detach())
    assert not torch.allclose(values[0], values[1])
    kit.eval()
    assert torch.equal(run(kit, batch), still)
    assert all(g.any() for name in "ab" for g in gradients(kit[name]).values())


def test_only_plain_parts_are_joined() -> None:
    """A class of one's own that extends LoRA may do more than it: it stays by itself."""

    class Louder(LowRankDelta):
        def forward(self, x: Tensor, y: Tensor, frozen: Any = None) -> Tensor:
            return super().forward(x, y, frozen) * 1.1

    delta = Louder(torch.randn(2, 4), torch.randn(3, 2), 1.0)
    assert type(delta).join([(delta, 1.0)]) is None


def test_over_a_half_precision_base() -> None:
    kit, batch = kit_with("llama", a=METHODS["a"], b=METHODS["b"])
    with kit.use(Stack("a", "b")):
        want = run(kit, batch)
        kit.base.bfloat16()
        got = run(kit, batch)
        assert got.dtype == torch.bfloat16
        assert_same(got.float(), want, 0.1)
        loss_of(kit(**batch)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in kit["b"].parameters())
