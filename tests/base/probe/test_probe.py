"""What one tiny forward proves: channels of fused projections, sublayers, batch relations, unused sites; without trace.

The channels are checked against what the models' own code does with them, worked out here by hand for each layout.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kitout
from kitout import LoRA
from kitout.base.find.find import find_sites
from kitout.base.probe.probe import prove_sites
from kitout.errors import UnusedSite
from zoo import EXTRA, ZOO, out

FUSED = ["gpt2", "gpt-neox", "falcon", "phi3", "modernbert", "timm-vit"]


def specimen(name: str):
    return ZOO[name] if name in ZOO else EXTRA[name]


def expected_channels(name: str, layer: nn.Module, width: int) -> dict[str, set[int]]:
    """Channels of q, k, v in the fused projection of each layout."""
    d = width
    contiguous = {"q": set(range(d)), "k": set(range(d, 2 * d)), "v": set(range(2 * d, 3 * d))}
    if name in ("gpt2", "modernbert", "timm-vit"):
        return contiguous
    attention = next(m for m in layer.modules() if hasattr(m, "config") and m is not layer)
    config = attention.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if name == "gpt-neox":  # per head: q, k, v
        return {
            part: {h * 3 * size + i * size + c for h in range(heads) for c in range(size)}
            for i, part in enumerate("qkv")
        }
    groups = config.num_kv_heads if name == "falcon" else config.num_key_value_heads
    if name == "phi3":
        ends = [heads * size, (heads + groups) * size, (heads + 2 * groups) * size]
        return {"q": set(range(ends[0])), "k": set(range(ends[0], ends[1])), "v": set(range(ends[1], ends[2]))}
    each = heads // groups  # falcon: per group its queries, then one key, one value
    span = (each + 2) * size
    return {
        "q": {g * span + c for g in range(groups) for c in range(each * size)},
        "k": {g * span + each * size + c for g in range(groups) for c in range(size)},
        "v": {g * span + (each + 1) * size + c for g in range(groups) for c in range(size)},
    }


@pytest.mark.parametrize("name", FUSED)
def test_channels_of_fused_projections(name: str) -> None:
    kit = kitout.attach(specimen(name).build())
    assert kit.survey.proven, kit.survey.unproven_reason
    whole = kit.sites("attn.qkv")[0]
    block = kit.base.get_submodule(f"{whole.tower}.{whole.layer}")
    expected = expected_channels(name, block, whole.d_in)
    for part in "qkv":
        site = kit.sites(f"attn.{part}")[0]
        assert site.path == whole.path
        assert set(site.channels or ()) == expected[part], part


@pytest.mark.parametrize("name", FUSED)
def test_lora_on_q_and_v_changes_exactly_their_channels(name: str) -> None:
    example = specimen(name)
    kit = kitout.attach(example.build())
    kit.add("qv", LoRA(rank=2, targets="attn.q attn.v"), seed=0)
    with torch.no_grad():
        for p in kit["qv"].parameters():
            p.normal_()
    fused = kit.base.get_submodule(kit["qv"].sites[0].path)
    outputs: list[torch.Tensor] = []
    hook = fused.register_forward_hook(lambda _m, _i, y: outputs.append(y.detach().clone()))
    with torch.no_grad():
        for route in (None, "qv"):
            with kit.use(route):
                kit(**example.batch(2, 0))
    hook.remove()
    changed = (outputs[0] - outputs[1]).abs().flatten(0, -2).amax(0) > 1e-6
    selected = {c for s in kit["qv"].sites if s.path == kit["qv"].sites[0].path for c in s.channels or ()}
    assert set(changed.nonzero().flatten().tolist()) == selected


def test_batch_relations() -> None:
    relations = {s.path: s.batch_relation for s in kitout.attach(ZOO["swin"].build()).survey.sites}
    windows = [r for p, r in relations.items() if p.endswith("attention.q_proj")]
    assert windows == ["multiple", "multiple", "batch", "batch"]  # the second stage is down to one window
    gpt2 = kitout.attach(ZOO["gpt2"].build())
    assert gpt2.survey.by_path("transformer.wpe").batch_relation in ("none", "one")
    assert gpt2.survey.by_path("transformer.h.0.mlp.c_fc").batch_relation == "batch"
    opt = kitout.attach(EXTRA["opt"].build())
    assert {s.batch_relation for s in opt.sites("mlp.up")} == {"multiple"}


def test_sublayers_end_at_the_sum_with_the_residual_stream() -> None:
    def output_and_input(name: str) -> dict[str, tuple[str, str | None]]:
        kit = kitout.attach(specimen(name).build())
        prefix = len(kit.survey.towers[0].path) + 3
        return {
            s.role: (s.path[prefix:], (s.input_from or "")[prefix:])
            for s in kit.survey.sites
            if s.role.startswith("sub.") and s.layer == 0
        }

    assert output_and_input("gemma2")["sub.mlp"] == (
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
    )  # sandwich
    assert output_and_input("olmo2")["sub.mlp"] == ("post_feedforward_layernorm", "mlp.gate_proj")  # norm after
    assert output_and_input("bert")["sub.mlp"] == ("output.dropout", "intermediate.dense")  # post-norm
    assert output_and_input("gpt-neox")["sub.mlp"][1] == "input_layernorm"  # parallel: the block's own input
    assert output_and_input("dinov2")["sub.mlp"] == ("layer_scale2", "norm2")  # LayerScale belongs to the sublayer
    assert output_and_input("vit")["sub.mlp"][0].endswith("fc2")  # one dropout ends both sublayers, so it is skipped


def test_the_probe_leaves_no_trace() -> None:
    model = ZOO["bert"].build().train()
    model.bert.encoder.layer[0].eval()
    model.classifier.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    assert prove_sites(find_sites(model)).proven
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class SkippingLayer(nn.TransformerEncoderLayer):
    """A block with a projection that no forward calls or reads."""

    def __init__(self) -> None:
        super().__init__(16, 2, 32, batch_first=True)
        self.skipped = nn.Linear(16, 16)


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SkippingLayer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_projection_that_never_runs_is_refused_when_named_and_left_out_of_a_group() -> None:
    kit = kitout.attach(TorchEncoder(), example_batch={"x": torch.randn(2, 3, 16)})
    for targets in ("skipped", "layers.1.skipped", "skipped mlp.*", "*.skipped"):
        with pytest.raises(UnusedSite, match="skipped"):
            kit.add("a", LoRA(rank=2, targets=targets))
    assert kit.names == []
    adapter = kit.add("b", LoRA(rank=2, targets="all-linear"))
    assert not any("skipped" in site.path for site in adapter.sites)
    assert list(adapter.left_out) == ["layers.0.skipped", "layers.1.skipped"]
    assert "left out of 'b': layers.*.skipped x2 (never runs" in str(kit)


def test_without_proof_the_first_forward_checks() -> None:
    kit = kitout.attach(TorchEncoder())
    assert not kit.survey.proven
    assert kit.survey.unproven_reason
    kit.add("a", LoRA(targets="skipped", rank=2))
    kit.use("a")
    with pytest.raises(UnusedSite, match="skipped"):
        kit(torch.randn(2, 3, 16))
    kit.add("group", LoRA(targets="all-linear", rank=2))
    kit.use("group")
    with pytest.warns(UserWarning, match=r"layers\.\*\.skipped x2"):
        kit(torch.randn(2, 3, 16))
    kit(torch.randn(2, 3, 16))  # once
    assert "left out of 'group': layers.*.skipped" in str(kit)
    kit.add("b", LoRA(targets="mlp.up", rank=2))
    kit.use("b")
    assert out(kit(torch.randn(2, 3, 16))).shape == (2, 3, 16)
