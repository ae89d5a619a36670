"""Linears that read one tensor as one node, against the plain form: who shares, and when they do not."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import kitout
from kitout import Kit, LoRA, Mix, Stack, fast
from kitout.methods.deltas import fused_low_rank
from kitout.route import Route
from kitout.runtime.modules.programs import DirectDelta
from zoo import ZOO

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5], [7, 7, 8, 8, 9]])
METHODS = {
    "a": LoRA(rank=3, targets="all-linear"),
    "b": LoRA(rank={"*": 2, "mlp.up": 4, "attn.v": 1}, alpha={"*": 3.0, "attn.k": 5.0}, targets="all-linear"),
    "dropout": LoRA(rank=2, targets="all-linear", dropout=0.3),
    "no_k": LoRA(rank=2, targets="attn.q attn.v mlp.gate"),
    "pissa": LoRA(rank=2, targets="all-linear", init="pissa"),
}


def build(model: nn.Module) -> Kit:
    kit = kitout.attach(model)
    generator = torch.Generator().manual_seed(1)
    for name, method in METHODS.items():
        adapter = kit.add(name, method, seed=0)
        with torch.no_grad():
            for value in adapter.parameters():
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    return kit.train()


def step(kit: Kit, route: Route, call: dict[str, Tensor] | None = None) -> list[Tensor]:
    """The logits and every gradient."""
    torch.manual_seed(0)  # of dropout
    with kit.use(route):
        logits = kit(**(call or {"input_ids": IDS})).logits
        logits.float().square().mean().backward()
    parameters = list(kit.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return [logits.detach().float(), *gradients]


def compare(kit: Kit, route: Route, tolerance: float = 1e-5, call: dict[str, Tensor] | None = None) -> None:
    found = step(kit, route, call)
    with fast.disabled():
        expected = step(kit, route, call)
    largest = max(float(value.abs().max()) for value in expected[1:])
    assert largest > 0
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == reference.dtype
        assert value.shape == reference.shape
        assert float((value - reference).abs().max()) <= tolerance * max(largest, float(reference.abs().max()))


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_enabled", True)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linears each node has had."""
    ran: list[int] = []
    node = fused_low_rank._FusedLowRank
    own = node.apply

    def apply(*args: Any) -> Any:
        ran.append(len(args[1]))
        return own(*args)

    monkeypatch.setattr(node, "apply", apply)
    return ran


def test_the_probe_sees_who_reads_one_tensor(tiny_llama: nn.Module) -> None:
    survey = kitout.attach(tiny_llama).survey
    assert survey.shared_inputs[:2] == (
        tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    )
    assert len(survey.shared_inputs) == 2 * len(survey.blocks)


def test_a_decoder_shares_what_its_encoder_gives_within_one_attention_alone() -> None:
    kit = kitout.attach(ZOO["t5"].build())
    owners = [{path.rpartition(".")[0] for path in paths} for paths in kit.survey.shared_inputs]
    assert all(len(owner) == 1 for owner in owners)
    assert any("EncDecAttention" in path for paths in kit.survey.shared_inputs for path in paths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "route",
    ["a", "b", "dropout", "no_k", "pissa", Stack("a", "b"), Mix({"a": 0.5, "b": 0.3}), ("a", "b", None, "a")],
    ids=str,
)
def test_every_route(route: Route, dtype: torch.dtype, tiny_llama: nn.Module) -> None:
    compare(build(tiny_llama.to(dtype)), route, 1e-5 if dtype == torch.float32 else 0.05)


def test_what_runs_as_one(tiny_llama: nn.Module, nodes: list[int]) -> None:
    kit = build(tiny_llama)
    compare(kit, "a")
    assert nodes == [3, 1, 2, 1] * len(kit.survey.blocks)
    nodes.clear()
    compare(kit, "no_k")
    assert nodes == [2, 1] * len(kit.survey.blocks)
    nodes.clear()
    compare(kit, "dropout")
    compare(kit, "pissa")
    assert nodes == []


def test_strength(tiny_llama: nn.Module) -> None:
    kit = build(tiny_llama)
    kit["a"].strength = 0.5
    compare(kit, "a")


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "autocast"])
def test_checkpointing_and_autocast(how: str, tiny_llama: Any) -> None:
    if how == "autocast":
        kit = build(tiny_llama)
        with torch.autocast("cpu", torch.bfloat16):
            compare(kit, "a", 0.05)
        return
    tiny_llama.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    tiny_llama.enable_input_require_grads()
    compare(build(tiny_llama), "a")


def test_distributed_data_parallel(tiny_llama: nn.Module, tmp_path: Path, nodes: list[int]) -> None:
    kit = build(tiny_llama)
    kit.use("a")
    for name in kit.names:
        kit[name].requires_grad_(name == "a")
    (_, *expected), number = step(kit, "a"), len(nodes)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(kit)
        for _ in range(2):
            parallel(input_ids=IDS).logits.square().mean().backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in kit.parameters()]
            parallel.zero_grad()
    finally:
        dist.destroy_process_group()
    assert len(nodes) == 3 * number
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_other_models(name: str) -> None:
    model = ZOO[name].build()
    kit = kitout.attach(model)
    kit.add("a", LoRA(rank=2, targets="all-linear"), seed=0)
    with torch.no_grad():
        for value in kit.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    ids = IDS % 20
    call = {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    kit.train()
    for module in model.modules():  # dropout off, so that both forms see the same
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def outputs() -> list[Tensor]:
        with kit.use("a"):
            out = kit(**call)[0]
        grads = torch.autograd.grad(
            out.square().mean(), list(kit.parameters()), allow_unused=True, materialize_grads=True
        )
        return [out.detach(), *grads]

    found = outputs()
    with fast.disabled():
        expected = outputs()
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-6, rtol=1e-4)


def test_another_input_of_one_of_them(tiny_llama: nn.Module, nodes: list[int]) -> None:
    """A hook gives k another tensor than the probe has seen, or writes to it on the way."""
    kit = build(tiny_llama)
    k = tiny_llama.get_submodule("model.layers.0.self_attn.k_proj")
    handle = k.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    compare(kit, "a")
    assert nodes[:4] == [1, 1, 1, 1]  # what hooks do, only its own call shows
    handle.remove()
    q = tiny_llama.get_submodule("model.layers.0.self_attn.q_proj")

    def write(_: nn.Module, args: tuple[Tensor], _out: Tensor) -> None:
        args[0].mul_(2.0)

    q.register_forward_hook(write)
    nodes.clear()
    with kit.use("a"), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kit(input_ids=IDS).logits.sum().backward()
    assert nodes[:3] == [3, 1, 1]


def test_outputs_that_nothing_comes_of() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, requires_grad=True)
    linears = [(torch.randn(8, 6), torch.randn(8)), (torch.randn(4, 6), None)]
    changes = [(torch.randn(2, 6, requires_grad=True), torch.randn(n, 2, requires_grad=True), 0.5) for n in (8, 4)]

    def plain() -> Tensor:
        (w, _), (a, up, scale) = linears[1], changes[1]
        return x @ w.t() + scale * (x @ a.t() @ up.t())

    inputs = [x, *changes[1][:2]]
    found = fused_low_rank.fused_low_rank(x, linears, changes)[1]
    torch.testing.assert_close(found, plain())
    grads = torch.autograd.grad(found.sin().sum(), [*inputs, changes[0][1]], allow_unused=True)
    assert grads[3] is None
    for value, reference in zip(grads, torch.autograd.grad(plain().sin().sum(), inputs), strict=False):
        torch.testing.assert_close(value, reference)


def test_a_forward_that_failed_leaves_nothing_for_the_next(tiny_llama: nn.Module) -> None:
    kit = build(tiny_llama)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = tiny_llama.get_submodule("model.layers.0.self_attn.k_proj").register_forward_hook(fail)
    with kit.use("a"), pytest.raises(KeyboardInterrupt):
        kit(input_ids=IDS)
    handle.remove()
    shared = {
        p.shared_input
        for _, p in kit.state.compile("a").programs
        if isinstance(p, DirectDelta) and p.shared_input is not None
    }
    assert any(s.ready for s in shared)
    copied = deepcopy(kit)  # a graph in it could not be copied
    compare(copied, "a")
    compare(kit, "a")
    assert not any(s.ready or s.x is not None for s in shared)


def test_a_product_whose_operands_are_kept_is_not_kept_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linears = [(torch.randn(8, 6), None)]
    changes = [(torch.randn(2, 6, requires_grad=True), torch.randn(8, 2, requires_grad=True), 0.5)]
    gate, up, gain = (torch.randn(3, 6, requires_grad=grad) for grad in (True, True, False))
    inputs = [gate, up, *changes[0][:2]]

    def saved(x: Tensor) -> tuple[set[int], list[Tensor]]:
        (y,) = fused_low_rank.fused_low_rank(x, linears, changes)
        kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}  # type: ignore[union-attr]
        return kept, list(torch.autograd.grad(y.sin().sum(), inputs, allow_unused=True, materialize_grads=True))

    makers = {  # whether x itself is kept
        lambda: gate.sin() * up.cos(): False,
        lambda: gate.sin().mul_(up): False,
        lambda: gain * gate: True,
        lambda: 2.0 * gate: True,
    }
    for make, is_kept in makers.items():
        x = make()
        kept, grads = saved(x)
        assert (x.data_ptr() in kept) is is_kept
        with monkeypatch.context() as patch:
            patch.setattr(fused_low_rank, "_saved_tensors_hooks", None)
            x = make()
            kept, expected = saved(x)
            assert x.data_ptr() in kept
        assert all(map(torch.equal, grads, expected))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        x = gate * up
        assert x.data_ptr() in saved(x)[0]
