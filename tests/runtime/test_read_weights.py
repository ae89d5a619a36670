"""Adapters on weights that a module multiplies by itself: torch's attention, functional attention, fused scans.

Off is bit-identical, merged equals active, a row equals that row alone, every parameter gets a gradient, files reload.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import kitout
from kitout import IA3, SSF, BitFit, FullFineTuning, Kit, LoRA, Method, Mix, Stack
from kitout.errors import FileError, NotMergeable, RouteError, UnusedSite
from kitout.route import RouteEntry
from zoo import EXTRA, D, randomize_model

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=2, alpha=3, targets="all-linear"),
    "lora of q and v": LoRA(rank=2),
    "dora": LoRA(rank=2, dora=True, targets="all-linear"),
    "pissa": LoRA(rank=2, init="pissa", targets="all-linear"),
    "ia3": IA3(targets="attn.k attn.v"),
    "bitfit": BitFit(),
    "ssf": SSF(),
}


class AttentionBlock(nn.Module):
    def __init__(self, batch_first: bool, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first, bias=bias)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        n = n if self.attention.batch_first else n.transpose(0, 1)
        a = self.attention(n, n, n, need_weights=False)[0]
        x = x + (a if self.attention.batch_first else a.transpose(0, 1))
        return x + self.down(self.up(x).relu())


class AttentionStack(nn.Module):
    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AttentionBlock(batch_first, bias) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class FusedLayers(nn.Module):
    """In eval mode torch runs none of the modules of such a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def _wavlm() -> nn.Module:
    settings = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = hf.WavLMConfig(
        vocab_size=32, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, **settings,
    )  # fmt: skip
    return hf.WavLMModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "torch attention": (AttentionStack, "x", (5, 16)),
    "batch second": (lambda: AttentionStack(batch_first=False), "x", (5, 16)),
    "no bias": (lambda: AttentionStack(bias=False), "x", (5, 16)),
    "fused layers": (FusedLayers, "x", (5, 16)),
    "siglip": (EXTRA["siglip"].build, "pixel_values", (3, 32, 32)),
    "wavlm": (_wavlm, "input_values", (320,)),
}


def attached(name: str) -> tuple[Kit, dict[str, Tensor]]:
    build, key, shape = MODELS[name]
    torch.manual_seed(0)
    batch = {key: torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))}
    return kitout.attach(randomize_model(build(), 5), example_batch=batch), batch


def values(kit: Kit | nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Everything the model gives, a pooled output too."""
    output: Any = kit(**batch)
    if isinstance(output, Tensor):
        return output
    parts = [output.last_hidden_state, *([output.pooler_output] if "pooler_output" in output else [])]
    return torch.cat([part.flatten(1) for part in parts], 1)


def randomize(adapter: nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_active_is_merged_and_trains(name: str, method: str, tmp_path: Path) -> None:
    kit, batch = attached(name)
    with torch.no_grad():
        base = values(kit, batch)
    adapter = kit.add("a", METHODS[method], seed=0)
    assert any(site.port == "weight" for site in adapter.sites) or name in ("siglip", "no bias")
    randomize(adapter)
    with kit.use("a"):
        active = values(kit, batch)
    active.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    with torch.no_grad():
        assert (active - base).abs().max() > 1e-3
        assert torch.equal(values(kit, batch), base)  # off
        kit.save("a", tmp_path / "a")
        kit.load(tmp_path / "a", name="b")
        with kit.use("b"):
            assert (values(kit, batch) - active).abs().max() < 1e-5 * active.abs().max()
        if name == "wavlm" and method in ("bitfit", "ssf"):
            return  # its weight-normed convolution has a test of its own
        kit.merge("a")
        assert (values(kit, batch) - active).abs().max() < 1e-5 * active.abs().max()
        kit.unmerge()
        assert torch.equal(values(kit, batch), base)
        kit.detach()
        assert not any("_kitout_hook" in m.__dict__ for m in kit.base.modules())


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_what_they_are_alone(name: str) -> None:
    kit, batch = attached(name)
    for method in ("lora", "dora", "bitfit"):
        randomize(kit.add(method, METHODS[method], seed=0))
    route = ["bitfit", None, "dora", "lora"]
    with torch.no_grad():
        with kit.use(route):
            together = values(kit, batch)
        for i, entry in enumerate(route):
            with kit.use(entry):
                alone = values(kit, {key: value[i : i + 1] for key, value in batch.items()})
            assert (together[i] - alone[0]).abs().max() < 2e-5 * together.abs().max()


def test_a_stack_and_a_strength_merge() -> None:
    kit, batch = attached("torch attention")
    for method in ("lora", "dora", "ssf"):
        randomize(kit.add(method, METHODS[method], seed=0))
    kit.strength("lora", 0.3)
    with torch.no_grad(), kit.use(Stack("ssf", "lora", "dora")):
        active = values(kit, batch)
    kit.merge("ssf", "lora", "dora")
    assert (values(kit, batch) - active).abs().max() < 1e-5 * active.abs().max()


ROUTES: dict[str, RouteEntry] = {
    "stack of shifts": Stack("lora_bias", "dora", "all"),
    "mix": Mix({"lora": 0.5, "dora": 0.7}),
    "mix of stacks": Mix({Stack("lora", "lora_bias"): 0.5, "all": -0.3}),
    "mix below dora": Stack(Mix({"lora": 0.5, "ssf": 0.5}), "dora"),
}


@pytest.mark.parametrize("name", MODELS)
def test_stacks_and_mixes_with_trained_biases_merge(name: str) -> None:
    kit, batch = attached(name)
    methods = {
        "lora": METHODS["lora of q and v"],
        "dora": METHODS["dora"],
        "ssf": SSF(targets="attn.q mlp.up"),
        "lora_bias": LoRA(rank=2, lora_bias=True, targets="all-linear"),
        "all": LoRA(rank=2, bias="all", dropout=0.1, targets="mlp.*"),
    }
    for key, method in methods.items():
        randomize(kit.add(key, method, seed=0))
    with torch.no_grad():
        for entry in ROUTES.values():
            with kit.use(entry):
                active = values(kit, batch)
            merged = kit.merged_copy(entry, check_saveable=False)
            assert (values(merged, batch) - active).abs().max() < 1e-5 * active.abs().max()
        route = [*ROUTES.values()][:2]
        with kit.use([*route, None, route[0]]):
            together = values(kit, batch)
        for i, entry in enumerate(route):
            with kit.use(entry):
                alone = values(kit, {key: value[i : i + 1] for key, value in batch.items()})
            assert (together[i] - alone[0]).abs().max() < 2e-5 * together.abs().max()


def test_an_attention_without_a_bias_takes_no_new_one() -> None:
    """With one bias and not the others torch would take its fast path, and fail."""
    kit, batch = attached("no bias")
    adapter = kit.add("a", LoRA(rank=2, lora_bias=True, targets="all-linear"))
    assert "no bias is read with it" in adapter.left_out["blocks.0.attention"]
    assert "blocks.0.attention.out_proj" in {site.path for site in adapter.sites}
    with torch.no_grad(), kit.use("a"):
        values(kit, batch)


def test_a_head_in_place_of_the_reader_is_used_alone() -> None:
    kit, _ = attached("torch attention")
    kit.add("lora", METHODS["lora"])
    path = "blocks.0.attention"
    kit.add("head", LoRA(rank=2, targets="mlp.*"), heads={path: nn.MultiheadAttention(16, 2, batch_first=True)})
    with pytest.raises(RouteError, match="changes weights that blocks"):
        kit.use(Stack("lora", "head"))
    with pytest.raises(NotMergeable, match="changes weights that blocks"):
        kit.merge("lora", "head")


def test_computed_weights_are_not_read_from_parameters() -> None:
    model = AttentionStack()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].attention, "in_proj_weight")
    kit = kitout.attach(model, example_batch={"x": torch.randn(2, 5, 16)})
    assert "blocks.0.attention" in kit.add("a", METHODS["lora"]).left_out


def test_the_parts_of_the_input_projection_are_sites() -> None:
    kit, _ = attached("torch attention")
    sites = kit.sites("attn.q attn.k attn.v", "0")
    assert [(s.path, s.role, len(s.channels or ())) for s in sites] == [
        ("blocks.0.attention", f"attn.{part}", 16) for part in "qkv"
    ]


def test_what_cannot_act_on_a_weight_is_left_out_of_a_group_and_refused_by_name() -> None:
    kit, _ = attached("torch attention")
    adapter = kit.add("a", LoRA(rank=2, dropout=0.1, targets="all-linear"))
    assert [s.path for s in adapter.sites] == [f"blocks.{i}.{p}" for i in (0, 1) for p in ("up", "down")]
    assert "set dropout=0" in str(kit)
    with pytest.raises(UnusedSite, match="set dropout=0"):
        kit.add("b", LoRA(rank=2, dropout=0.1, targets="out_proj"))
    with pytest.raises(UnusedSite, match="has no input of its own"):
        kit.add("b", IA3(targets="in:out_proj"))


@pytest.mark.parametrize("method", ["lora", "bitfit", "ssf"])
def test_a_scan_that_reads_weights(method: str) -> None:
    specimen = EXTRA["jamba"]
    kit, batch = kitout.attach(specimen.build()), specimen.batch(2, 0) | {"use_cache": False}
    adapter = kit.add("a", METHODS[method], seed=0)
    assert not adapter.left_out
    assert any(site.path.endswith("dt_proj") for site in adapter.sites)
    with torch.no_grad():
        base = kit(**batch).logits
        randomize(adapter)
        with kit.use("a"):
            active = kit(**batch).logits
        with kit.use(["a", None]):
            rows = kit(**batch).logits
        assert (rows - torch.stack((active[0], base[1]))).abs().max() < 2e-5 * active.abs().max()
        if method != "ssf":  # its norms take no shift
            merged = kit.merged_copy("a")
            assert (merged(**batch).logits - active).abs().max() < 2e-5 * active.abs().max()


def test_peft_has_no_such_adapter(tmp_path: Path) -> None:
    kit, _ = attached("wavlm")
    kit.add("a", METHODS["lora"])
    with pytest.raises(FileError, match="PEFT wraps modules"):
        kitout.save_peft(kit, "a", tmp_path / "a")


def test_a_weight_trained_whole_and_changed_by_another_is_refused() -> None:
    kit, batch = attached("torch attention")
    kit.add("lora", METHODS["lora"])
    kit.add("full", FullFineTuning())
    with pytest.raises(RouteError, match="one at a time"), kit.use(Stack("lora", "full")):
        kit(**batch)
    with pytest.raises(NotMergeable, match="merge one of them"):
        kit.merge("full", "lora")
