"""LoRA, rsLoRA, DoRA, PiSSA and IA3 against Hugging Face PEFT with copied weights: outputs, gradients, merged weights.

Both start from the same tiny model with random biases and norms; alpha is not the rank. Where PEFT's default targets
are not the paper's, the targets are given to both.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, LoRA, Method
from kitout.base.site import Site
from kitout.delta import Delta
from zoo import ZOO, out

peft = pytest.importorskip("peft")


@dataclass(frozen=True)
class Pair:
    """The same adapter twice. config: PEFT's."""

    name: str
    species: str
    method: Method
    kind: str
    config: dict[str, Any] = field(default_factory=dict)

    def peft_config(self) -> Any:
        return (peft.IA3Config if self.kind == "ia3" else peft.LoraConfig)(**self.config)


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT_FFN = r".*(query|key|value|intermediate\.dense|layer\.\d\.output\.dense)"
RA = {"r": 3, "lora_alpha": 5}
OURS = {"rank": 3, "alpha": 5}

PAIRS = [
    Pair("linear", "llama", LoRA(**OURS, targets="all-linear"), "lora", {**RA, "target_modules": LLAMA}),
    Pair("default-targets", "llama", LoRA(**OURS), "lora", {**RA, "target_modules": ["q_proj", "v_proj"]}),
    Pair("biased", "bert", LoRA(**OURS), "lora", {**RA, "target_modules": ["query", "value"]}),
    Pair(
        "rslora", "bert", LoRA(**OURS, rslora=True), "lora",
        {**RA, "target_modules": ["query", "value"], "use_rslora": True},
    ),
    Pair(
        "transposed", "gpt2", LoRA(**OURS, targets="attn.qkv attn.o mlp.*"), "lora",
        {**RA, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    Pair("embedding", "bert", LoRA(**OURS, targets="embed"), "lora", {**RA, "target_modules": ["word_embeddings"]}),
    Pair("conv2d", "vit", LoRA(**OURS, targets="patch"), "lora", {**RA, "target_modules": ["projection"]}),
    Pair("by-role", "llama", LoRA(rank={"attn.*": 2, "mlp.*": 4}, alpha=3, targets="all-linear"), "lora",
         {"r": 2, "lora_alpha": 3, "target_modules": LLAMA,
          "rank_pattern": {"gate_proj": 4, "up_proj": 4, "down_proj": 4}}),
    Pair("layers", "llama", LoRA(**OURS, layers="last:1"), "lora",
         {**RA, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    Pair("dora", "llama", LoRA(**OURS, dora=True, targets="all-linear"), "lora",
         {**RA, "target_modules": LLAMA, "use_dora": True}),
    Pair("dora-biased", "bert", LoRA(**OURS, dora=True, targets="attn.q attn.v mlp.up"), "lora",
         {**RA, "target_modules": ["query", "value", "intermediate.dense"], "use_dora": True}),
    Pair("ia3", "llama", IA3(), "ia3",
         {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    Pair("ia3-biased", "bert", IA3(), "ia3",
         {"target_modules": r".*(key|value|layer\.\d\.output\.dense)",
          "feedforward_modules": r".*layer\.\d\.output\.dense"}),
    Pair("ia3-qkv", "llama", IA3(preset="qkv"), "ia3",
         {"target_modules": ["q_proj", "k_proj", "v_proj"], "feedforward_modules": []}),
    Pair("ia3-t5", "t5", IA3(), "ia3", {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}),
]  # fmt: skip


def wrapped(pair: Pair) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(ZOO[pair.species].build(), pair.peft_config()).eval()


def counterparts(theirs: nn.Module, site: Site, delta: Delta) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(our parameter, PEFT's) at one site; PEFT's is viewed in our shape when compared."""
    module = theirs.get_submodule(f"base_model.model.{site.path}")
    if "ia3_l" in dict(module.named_children()):
        return [(delta.scale, module.ia3_l["default"])]
    if module.lora_embedding_A:
        return [(delta.a, module.lora_embedding_A["default"]), (delta.b, module.lora_embedding_B["default"])]
    pairs = [(delta.a, module.lora_A["default"].weight), (delta.b, module.lora_B["default"].weight)]
    if getattr(module, "lora_magnitude_vector", None):
        pairs.append((delta.magnitude, module.lora_magnitude_vector["default"].weight))
    return pairs


@pytest.fixture(params=PAIRS, ids=lambda p: p.name)
def both(request) -> tuple[Pair, kitout.Kit, nn.Module, list[tuple[nn.Parameter, nn.Parameter]]]:
    """The pair, kitout's kit with an active adapter, peft's model, all counterparts; with the same random values."""
    pair = request.param
    kit, theirs = kitout.attach(ZOO[pair.species].build()), wrapped(pair)
    adapter = kit.add("a", pair.method, seed=0).eval()
    kit.use("a")
    matched = [m for s in adapter.sites for m in counterparts(theirs, s, adapter.delta(s))]
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert {id(p) for _, p in matched} == {id(p) for p in trained}, "PEFT trains something else"
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, other in matched:
            assert own.numel() == other.numel()
            own.add_(torch.randn(own.shape, generator=draw), alpha=0.3)
            other.copy_(own.view(other.shape))
    return pair, kit, theirs, matched


def test_outputs_are_equal(both) -> None:
    pair, kit, theirs, _ = both
    batch = ZOO[pair.species].batch(3, 0)
    with torch.no_grad():
        expected, got = out(theirs(**batch)), out(kit(**batch))
        kit.use(None)
        base = out(kit(**batch))
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_gradients_are_equal(both) -> None:
    pair, kit, theirs, matched = both
    batch = ZOO[pair.species].batch(3, 0)
    for model in (kit, theirs):
        logits = out(model(**batch))
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    for own, other in matched:
        scale = other.grad.abs().max().item()
        assert scale > 0
        assert (own.grad - other.grad.view(own.shape)).abs().max() <= 2e-5 * max(1.0, scale)


def test_merged_weights_are_equal(both) -> None:
    _, kit, theirs, _ = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = dict(theirs.merge_and_unload().named_parameters())
    kit.merge("a")
    for name, value in kit.base.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5, msg=name)


def test_dropout_falls_where_peft_lets_it_fall() -> None:
    """The same random numbers drop the same inputs."""
    species = ZOO["llama"]
    pair = Pair("", "llama", LoRA(**OURS, dropout=0.4), "lora",
                {**RA, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.4})  # fmt: skip
    kit, theirs = kitout.attach(species.build()), wrapped(pair).train()
    adapter = kit.add("a", pair.method)
    kit.use("a")
    kit.train()
    with torch.no_grad():
        for site in adapter.sites:
            for own, other in counterparts(theirs, site, adapter.delta(site)):
                own.normal_(std=0.3)
                other.copy_(own)
        results = []
        for model in (kit, theirs):
            torch.manual_seed(5)
            results.append(out(model(**species.batch(2, 0))))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_rslora_is_lora_with_a_larger_alpha() -> None:
    kit, batch = kitout.attach(ZOO["llama"].build()), ZOO["llama"].batch(2, 0)
    kit.add("rs", LoRA(rank=4, alpha=6, rslora=True), seed=0)
    kit.add("plain", LoRA(rank=4, alpha=6 * math.sqrt(4)), seed=0)
    with torch.no_grad():
        for name in ("rs", "plain"):
            for i, p in enumerate(kit[name].parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        with kit.use("rs"):
            first = out(kit(**batch))
        with kit.use("plain"):
            assert torch.equal(first, out(kit(**batch)))


@torch.no_grad()
def test_pissa_starts_and_moves_as_in_peft() -> None:
    """PEFT takes B A off the base; here the base stays whole and the start is taken off the change."""
    species, targets = ZOO["bert"], ["query", "value"]
    batch = species.batch(2, 0)
    kit = kitout.attach(species.build())
    adapter = kit.add("a", LoRA(**OURS, init="pissa"))
    theirs = wrapped(Pair("", "bert", LoRA(), "lora", {**RA, "target_modules": targets, "init_lora_weights": "pissa"}))
    kit.use("a")
    for site in adapter.sites:
        delta, module = adapter.delta(site), theirs.get_submodule(f"base_model.model.{site.path}")
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        torch.testing.assert_close(delta.b @ delta.a, b @ a, atol=1e-5, rtol=1e-4)  # signs of a pair are free
        w = site.module.weight
        u, s, v = torch.linalg.svd(w)
        torch.testing.assert_close(delta.scale * delta.b @ delta.a, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out(kit(**batch)), out(theirs(**batch)), atol=1e-5, rtol=1e-5)
    for site in adapter.sites:
        delta, module = adapter.delta(site), theirs.get_submodule(f"base_model.model.{site.path}")
        for own, other in ((delta.a, module.lora_A["default"].weight), (delta.b, module.lora_B["default"].weight)):
            own.copy_(other.add_(torch.randn_like(other), alpha=0.2))
    got, expected = out(kit(**batch)), out(theirs(**batch))
    with kit.use(None):
        assert (got - out(kit(**batch))).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_starts_as_in_peft() -> None:
    """The same distribution: bounds of A, zeros of B, magnitudes of DoRA, ones of IA3."""
    kit = kitout.attach(ZOO["bert"].build())
    ours = kit.add("a", LoRA(rank=40, dora=True))
    pair = Pair("", "bert", LoRA(), "lora", {"r": 40, "target_modules": ["query", "value"], "use_dora": True})
    theirs = wrapped(pair)
    spread: dict[str, list[Tensor]] = {"own": [], "other": []}
    for site in ours.sites:
        (a, a2), (b, b2), (m, m2) = counterparts(theirs, site, ours.delta(site))
        assert not b.any()
        assert not b2.any()
        torch.testing.assert_close(m, m2)
        spread["own"].append(a.detach())
        spread["other"].append(a2.detach())
    own, other = torch.stack(spread["own"]), torch.stack(spread["other"])
    assert own.std() == pytest.approx(other.std().item(), rel=0.03)
    assert own.abs().max() == pytest.approx(other.abs().max().item(), rel=0.01)
