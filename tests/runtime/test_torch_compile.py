"""torch.compile in one graph: no adapter, an adapter, rows, a stack; equal logits and no graph break.

Without autograd and with it ("aot_eager" traces the backward too); a compiled model follows `use`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, SSF, AdaptFormer, BitFit, Kit, LoRA, Method, Mix, PrefixTuning, PromptTuning, Stack
from laws.activate import assert_same, kit_with, put_on, run
from zoo import ZOO, Specimen, out

ROUTES: dict[str, Any] = {
    "off": None,
    "lora": "lora",
    "rows": ["lora", None, "ia3"],
    "rows of one kind": ["lora", "low", "lora"],
    "stack": Stack("lora", "bias", "ia3"),
    "mix": Mix({"lora": 0.4, "ia3": 0.2}),
    "mix of one kind": Mix({"lora": 0.4, "low": -0.2}),
    "mix of several runs": Mix({"ia3": 0.4, "ssf": 0.2}),
    "dora": "dora",
    "parallel": "parallel",
    "ssf": "ssf",
}
slow = (
    pytest.mark.slow
)  # tracing takes seconds: the first of a kind is tested each time, the others by `make test-slow`
FIRST = [("llama", "off"), ("llama", "rows"), ("llama", "stack"), ("gpt2", "rows of one kind")]
CELLS = [
    pytest.param(ZOO[m], route, id=f"{m}-{n}", marks=[] if (m, n) in FIRST else [slow])
    for m in ("llama", "gpt2", "bert", "vit")
    for n, route in ROUTES.items()
]


def dressed(specimen: Specimen) -> Kit:
    kit = kitout.attach(specimen.build())
    for seed, (name, method) in enumerate(
        {
            "lora": LoRA(rank=2, targets="attn.* mlp.*"),
            "low": LoRA(rank=3, alpha=2),
            "dora": LoRA(rank=2, dora=True),
            "ia3": IA3(),
            "bias": BitFit(),
            "parallel": AdaptFormer(width=5, dropout=0.0),
            "ssf": SSF(),
        }.items()
    ):
        put_on(kit, method, name, seed=seed)
    return kit


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("specimen", "route"), CELLS)
def test_one_graph_and_the_same_logits(specimen: Specimen, route: Any) -> None:
    kit, batch = dressed(specimen), specimen.batch(3, 0)
    kit.use(route)
    compiled = torch.compile(kit.base, fullgraph=True, backend="eager")  # raises at the first graph break
    assert_same(run(compiled, batch), run(kit, batch), 1e-6)


@pytest.mark.parametrize(
    "route",
    [
        pytest.param(r, marks=[] if isinstance(r, list) else [slow])
        for r in ("lora", ["lora", None, "ia3"], "dora", Stack("lora", "low"))
    ],
    ids=str,
)
def test_gradients_of_the_compiled_model(route: Any) -> None:
    specimen = ZOO["llama"]
    kit, batch = dressed(specimen), specimen.batch(3, 0)
    kit.use(route)
    compiled = torch.compile(kit.base, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, batch), run(kit, batch))
    grads = []
    for model in (kit.base, compiled):
        kit.zero_grad()
        out(model(**batch)).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in kit.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    for name, gradient in grads[0].items():
        assert_same(grads[1][name], gradient, what=name)


def test_a_compiled_model_follows_use() -> None:
    specimen = ZOO["llama"]
    kit, batch = dressed(specimen), specimen.batch(3, 0)
    values = {}
    for name in (None, "lora", "ia3"):
        with kit.use(name):
            values[name] = run(kit, batch)
    compiled = torch.compile(kit.base, fullgraph=True, backend="eager")
    for name in ("lora", None, "ia3", "lora", None):
        kit.use(name)
        assert_same(run(compiled, batch), values[name], 1e-6)
        with kit.use(None):
            assert_same(run(compiled, batch), values[None], 1e-6)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@slow
@pytest.mark.parametrize("method", [PromptTuning(length=3), PrefixTuning(length=4)], ids=["prompt", "prefix"])
def test_virtual_tokens_are_one_graph(method: Method) -> None:
    """What a thread is doing, which prompts and positions depend on, is looked up by nothing in the graph."""
    kit, batch = kit_with("llama", a=method)
    kit.use("a")
    want = out(kit(**batch, use_cache=False))
    compiled = torch.compile(kit.base, fullgraph=True, backend="eager")
    assert_same(out(compiled(**batch, use_cache=False)), want, 1e-6)


@slow
def test_a_compiled_model_sees_new_values_and_strengths() -> None:
    specimen = ZOO["llama"]
    kit, batch = dressed(specimen), specimen.batch(3, 0)
    kit.use(["lora", "lora", None])
    compiled = torch.compile(kit.base, fullgraph=True, backend="eager")
    run(compiled, batch)
    with torch.no_grad():
        for p in kit["lora"].parameters():
            p.mul_(1.5)
    assert_same(run(compiled, batch), run(kit, batch), 1e-6)
    kit.strength("lora", 0.5)
    assert_same(run(compiled, batch), run(kit, batch), 1e-6)


@slow
def test_the_kit_itself_compiles() -> None:
    specimen = ZOO["llama"]
    kit, batch = dressed(specimen), specimen.batch(3, 0)
    kit.use("lora")
    want = run(kit, batch)
    compiled: nn.Module = torch.compile(kit, backend="eager")
    value: Tensor = run(compiled, batch)
    assert_same(value, want, 1e-6)
