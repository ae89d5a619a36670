"""kitout.compile: equal to eager forward and backward, graphs by kind, a limit that is said, nothing left by detach."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, Kit, LoRA
from kitout.errors import ConfigError, KitDetached, KitoutError
from laws.activate import assert_same
from zoo import ZOO, out

SPECIMEN = ZOO["llama"]
# of a first use of torch's C++ backend
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kit_of(**methods: Any) -> Kit:
    kit = kitout.attach(SPECIMEN.build()).train()
    for seed, (name, method) in enumerate(methods.items()):
        adapter = kit.add(name, method, seed=seed)
        with torch.no_grad():
            for value in adapter.parameters():
                value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)))
    return kit


def step(kit: Kit, route: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a forward and backward."""
    kit.zero_grad()
    kit.use(route)
    logits = out(kit(**SPECIMEN.batch(2, 0), **inputs))
    if route is not None:
        logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in kit.named_parameters() if p.grad is not None}


def assert_equal_steps(kit: Kit, expected: Any, route: Any, **inputs: Any) -> None:
    logits, gradients = step(kit, route, **inputs)
    assert_same(logits, expected[0], 1e-5)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_same(gradients[name], gradient, 1e-5, what=name)


def test_equal_to_eager_and_adapters_of_one_shape_share_graphs() -> None:
    kit = kit_of(a=LoRA(rank=2), b=LoRA(rank=2), ia3=IA3())
    expected = {route: step(kit, route) for route in ("a", "b", "ia3")}
    assert kitout.compile(kit, backend="eager") is kit
    assert kitout.compiled(kit).graphs == ()
    for route in ("a", "b"):
        assert_equal_steps(kit, expected[route], route)
        assert kitout.compiled(kit).kinds == {"LoRA": 2}  # the first block's input needs no gradient, the others' do
    assert_equal_steps(kit, expected["ia3"], "ia3")
    report = kitout.compiled(kit)
    assert report.kinds == {"LoRA": 2, "IA3": 2}
    assert not report.eager
    assert report.seconds > 0
    assert all(graph.shape == (2, 7, 48) and graph.has_grad for graph in report.graphs)
    assert "IA3: 2 graphs" in str(report)


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("aot_eager", marks=slow), pytest.param("inductor", marks=slow)]
)
def test_checkpointing_recomputes_the_graph(backend: str) -> None:
    kit = kit_of(a=LoRA(rank=2))
    kit.gradient_checkpointing_enable()
    expected = step(kit, "a", use_cache=False)
    kitout.compile(kit, backend=backend)
    assert_equal_steps(kit, expected, "a", use_cache=False)
    assert kitout.compiled(kit).kinds == {"LoRA": 1}
    assert not kitout.compiled(kit).eager


@slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "route",
    [None, "a", "ia3", ["a", "ia3"], ["a", "b"], kitout.Mix({"a": 0.5, "ia3": 0.2}), kitout.Stack("a", "ia3")],
    ids=str,
)
def test_every_kind_of_route(route: Any, backend: str) -> None:
    kit = kit_of(a=LoRA(rank=2), b=LoRA(rank=2), ia3=IA3())
    expected = step(kit, route)
    kitout.compile(kit, backend=backend)
    assert_equal_steps(kit, expected, route)
    assert not kitout.compiled(kit).eager


@slow
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "t5"])
def test_other_models(name: str) -> None:
    specimen = ZOO[name]
    kit = kitout.attach(specimen.build())
    kit.add("a", LoRA(rank=2), seed=0)
    kit.use("a")
    batch = specimen.batch(2, 0) | ({"use_cache": False} if name == "gpt2" else {})
    expected = out(kit(**batch))
    kitout.compile(kit, backend="aot_eager")
    assert_same(out(kit(**batch)), expected, 1e-5)
    assert kitout.compiled(kit).graphs


@slow
@pytest.mark.parametrize("method", [LoRA(rank=2), kitout.PrefixTuning(length=3)], ids=lambda m: type(m).__name__)
def test_rows_run_as_graphs(method: kitout.Method) -> None:
    kit = kit_of(a=method, b=method)
    expected = step(kit, ["a", "b"])
    kitout.compile(kit, backend="eager")
    for route in (["a", "b"], ["b", "a"], ["a", "b"]):
        step(kit, route)
    assert_equal_steps(kit, expected, ["a", "b"])
    report = kitout.compiled(kit)
    assert not report.eager
    kind = f"rows({type(method).__name__})"
    assert report.kinds == {kind: 2}  # what a first call keeps is no condition of its graph
    step(kit, ["a", "a"])
    assert kitout.compiled(kit).kinds == {kind: 4}  # rows that share adapters in another way


def test_past_the_limit_a_warning_names_the_route_and_the_rest_goes_on() -> None:
    kit = kit_of(a=LoRA(rank=2), ia3=IA3())
    expected = step(kit, "ia3")
    kitout.compile(kit, backend="eager", limit=2)
    step(kit, "a")
    with pytest.warns(RuntimeWarning, match=r"2 graphs, which is the limit.*under 'ia3' \(IA3\).*limit=4") as found:
        assert_equal_steps(kit, expected, "ia3")
    assert len(found) == 1
    step(kit, "ia3")  # once is enough
    before = kitout.compiled(kit)
    assert before.kinds == {"LoRA": 2}
    assert before.eager == {"past the limit": 4}
    step(kit, "a")
    assert kitout.compiled(kit).eager == before.eager  # it has its graphs still


def test_a_cache_is_filled_and_generation_is_as_before() -> None:
    kit = kit_of(a=LoRA(rank=2)).eval()
    kit.use("a")
    batch = SPECIMEN.batch(2, 0)
    with torch.no_grad():
        expected = kit(**batch, use_cache=True)
        answer = kit.generate(**batch, max_new_tokens=3, do_sample=False)
        kitout.compile(kit, backend="eager")
        found = kit(**batch, use_cache=True)
        for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
            assert_same(ours.keys, theirs.keys, 1e-5)
            assert_same(ours.values, theirs.values, 1e-5)
        assert kitout.compiled(kit).kinds == {"LoRA": 1}  # one for all layers
        assert torch.equal(kit.generate(**batch, max_new_tokens=3, do_sample=False), answer)
    assert kitout.compiled(kit).eager == {"a cache that holds positions": 2 * 2}


def test_hooks_on_modules_in_a_block_run() -> None:
    kit = kit_of(a=LoRA(rank=2))
    step(kit, "a")
    kitout.compile(kit, backend="eager")
    seen = []
    module = kit.base.get_submodule(kit.survey.blocks[0].path)
    handle = next(iter(module.children())).register_forward_hook(lambda *_: seen.append(1))
    step(kit, "a")
    handle.remove()
    assert seen
    assert kitout.compiled(kit).eager == {"hooks on modules in the block": 1}


class _Printing(nn.Module):
    """A block that Dynamo cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


def test_what_dynamo_cannot_follow_runs_as_before() -> None:
    kit = kit_of(a=LoRA(rank=2))
    expected = step(kit, "a")
    kit.base.get_submodule(kit.survey.blocks[0].path).mlp.act_fn = nn.Sequential(nn.SiLU(), _Printing())
    kitout.compile(kit, backend="eager")
    with pytest.warns(RuntimeWarning, match="cannot follow .* under 'a' .LoRA., so it runs without a graph"):
        assert_equal_steps(kit, expected, "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal_steps(kit, expected, "a")
    report = kitout.compiled(kit)
    assert "torch.compile cannot follow it" in report.eager
    assert "LoRA: not compiled" in str(report)


def test_detach_and_disable_leave_no_trace() -> None:
    model = SPECIMEN.build()
    before = [(path, type(m), sorted(m.__dict__), m.forward.__func__) for path, m in model.named_modules()]
    kit = kitout.attach(model)
    kit.add("a", LoRA(rank=2))
    kit.use("a")
    kitout.compile(kit, backend="eager")
    kit(**SPECIMEN.batch(2, 0))
    copied = copy.deepcopy(kit)
    assert kitout.compiled(copied).limit == 0
    copied(**SPECIMEN.batch(2, 0))
    assert kitout.compiled(kit).graphs
    kitout.compile(kit, disable=True)
    kit(**SPECIMEN.batch(2, 0))
    assert str(kitout.compiled(kit)) == "not compiled: kitout.compile(kit)"
    kitout.compile(kit, backend="eager")
    assert kit.detach() is model
    after = [(path, type(m), sorted(m.__dict__), m.forward.__func__) for path, m in model.named_modules()]
    assert after == before
    with pytest.raises(KitDetached):
        kitout.compile(kit)


def test_refused_with_what_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_of()
    with pytest.raises(KitoutError, match=r"takes a kit, found .*kitout.attach\(model\)"):
        kitout.compile(kit.base)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"(?s)2 errors.*did you mean 'dynamic'.*1 or more, found 0"):
        kitout.compile(kit, backend="eager", limit=0, dynamics=True)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/compiler",))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*apt install g\+\+.*train.compile=off"):
        kitout.compile(kit)
    kit.base.get_submodule(kit.survey.blocks[0].path).mlp.up_proj.weight = nn.Parameter(
        torch.zeros(2, 2, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ConfigError, match=r"1 weights are quantized \(.*up_proj.weight.*train.compile=off"):
        kitout.compile(kit, backend="eager")
