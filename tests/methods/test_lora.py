"""LoRA over the targets that people type, and a rank as a request where one linear of many is narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import kitout
from kitout import LoRA
from kitout.errors import ConfigError, TargetError
from zoo import ZOO, randomize_model

USUAL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def mixture() -> torch.nn.Module:
    """Its shared expert has a gate of width 1."""
    config = hf.Qwen2MoeConfig(**SIZES, intermediate_size=80, max_position_embeddings=64, **EXPERTS)
    return randomize_model(hf.Qwen2MoeForCausalLM(config), seed=0)


def ranks(kit: kitout.Kit, name: str) -> dict[str, int]:
    return {s.path.rpartition(".")[2]: kit[name].delta(s).a.shape[0] for s in kit[name].sites}


def logits(kit: kitout.Kit) -> torch.Tensor:
    with torch.no_grad():
        return kit(**ZOO["llama"].batch(2, 1)).logits


@pytest.mark.parametrize("species", ["llama", "llama-tied", "qwen3"])
def test_the_most_copied_target_list(species: str) -> None:
    kit = kitout.attach(ZOO[species].build())
    kit.add("a", LoRA(targets=USUAL), seed=0)
    kit.add("b", LoRA(targets="all-linear"), seed=0)
    assert kit["a"].sites == kit["b"].sites


def test_a_list_of_words() -> None:
    method = LoRA(targets=["q_proj", "v_proj"])
    assert method == LoRA(targets="q_proj v_proj")
    with pytest.raises(ConfigError, match="targets"):
        LoRA(targets=["q_proj", 3])
    with pytest.raises(ConfigError, match="more than 50"):
        LoRA(rank={f"re:.*{i}": 4 for i in range(51)})


def test_one_narrow_linear_takes_the_rank_it_can_hold(tmp_path: Path) -> None:
    kit = kitout.attach(mixture())
    kit.add("a", LoRA(rank=8, alpha=4, targets="all-linear"))
    assert ranks(kit, "a") == dict.fromkeys(USUAL.split(), 8) | {"shared_expert_gate": 1}
    assert {kit["a"].delta(s).scale for s in kit["a"].sites} == {0.5}  # alpha / the rank that was asked for
    note = "a: rank clipped to what the site can hold: 2 x shared_expert_gate (8 -> 1)"
    assert sum(note in line for line in str(kit).splitlines()) == 1
    count = kit.num_parameters("a")
    assert count.formula == count.trainable
    for p in kit["a"].parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    kit.use("a")
    kit.save("a", tmp_path / "own")
    kitout.save_peft(kit, "a", tmp_path / "peft")
    kit.load(tmp_path / "own", name="b")
    kitout.load_peft(kit, tmp_path / "peft", "c")
    before = logits(kit)
    for name in "bc":
        with kit.use(name):
            torch.testing.assert_close(logits(kit), before, rtol=1e-5, atol=1e-5)
        assert ranks(kit, name) == ranks(kit, "a")


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": "mlp.* shared_expert_gate"},
        {"targets": "*_proj *_gate -q_proj"},
        {"targets": "re:.*(_gate|k_proj)"},
        {"targets": "all-linear", "rank": {"*": 8}},
        {"targets": "all-linear", "rank": 49},
        {"targets": "k_proj q_proj", "rank": 30},
    ],
)
def test_a_rank_for_many_sites_is_a_request(settings: dict[str, Any]) -> None:
    kit = kitout.attach(mixture())
    kit.add("a", LoRA(**settings))
    assert "a: rank clipped" in str(kit)
    logits(kit)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": "model.layers.0.mlp.shared_expert_gate"}, "at most 1"),
        ({"targets": "shared_expert_gate"}, "at most 1"),
        ({"targets": "k_proj", "rank": 25}, "at most 24"),
        ({"targets": "attn.*", "rank": {"attn.*": 4, "k_proj": 25}}, "at most 24"),
        ({"targets": "attn.q attn.v", "rank": 49}, "at most 48"),
    ],
)
def test_a_rank_that_no_named_site_can_hold_is_refused(settings: dict[str, Any], said: str) -> None:
    kit = kitout.attach(mixture())
    with pytest.raises(ConfigError, match=said):
        kit.add("a", LoRA(**settings))
    assert kit.names == []


def test_a_rank_that_is_kept() -> None:
    kit = kitout.attach(mixture())
    kit.add("a", LoRA(targets="all-linear", clip_rank=False))
    assert set(ranks(kit, "a").values()) == {8}
    with pytest.raises(ConfigError, match="1 principal directions"):
        kit.add("b", LoRA(targets="all-linear", clip_rank=False, init="pissa"))
    kit.add("b", LoRA(targets="all-linear", init="pissa"))
    logits(kit)


def test_a_sublayer_says_which_projection_to_name() -> None:
    kit = kitout.attach(mixture())
    with pytest.raises(TargetError, match=r"write mlp[.]down"):
        kit.add("a", LoRA(targets="sub.mlp"))
    mixtral = hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, intermediate_size=80, num_local_experts=2))
    with pytest.raises(TargetError, match=r"sublayer adds$"):  # its experts are no projections
        kitout.attach(mixtral).add("a", LoRA(targets="sub.mlp"))
