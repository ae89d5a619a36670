"""A Stack or a Mix, merged, is what it is when active; what of it has no form in weights is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kitout import IA3, SSF, BitFit, FullFineTuning, LoRA, Mix, PartialFineTuning, PrefixTuning, Stack
from kitout.errors import NotMergeable, RouteError, UnknownAdapter
from laws.activate import assert_same, kit_with, run, untrivial

LINEARS = "attn.v attn.o mlp.down"
METHODS = {
    "lora": LoRA(rank=3, alpha=5, targets="all-linear"),
    "lora-in": LoRA(rank=2, alpha=3, targets="in:mlp.down in:attn.o"),
    "ia3": IA3(targets="attn.v in:mlp.down in:attn.o"),
    "both": IA3(targets="mlp.down in:mlp.down attn.o"),
    "ssf": SSF(targets=f"{LINEARS} in:mlp.down"),
    "bitfit": BitFit(targets=LINEARS),
    "dora": LoRA(rank=2, alpha=3, dora=True, targets=LINEARS),
    "full": FullFineTuning(targets=LINEARS),
    "norms": PartialFineTuning(part="norms"),
}
ENTRIES = (
    Mix({"lora": 0.7, "dora": 0.4}),
    Mix({"lora": 0.7, "ia3": 0.4}),
    Mix({"lora-in": 0.7, "dora": 0.4, "ssf": 0.3}),
    Stack("lora-in", Mix({"dora": 0.7, "ia3": 0.3}), "full"),
    Mix({"ia3": -0.3, "both": 1.2, "ssf": 0.5}),
    Mix({"lora-in": 0.6, "both": 0.5, "bitfit": 0.9}),
    Mix({"full": 0.5, "norms": 0.3, "lora": 0.2}),
    Mix({"full": 0.5, "lora-in": 0.3, "ssf": 0.2}),
    Stack("norms", "lora", Mix({"dora": 0.7, "bitfit": 0.3})),
    Stack(Mix({"ia3": 0.5, "lora": 0.5}), "dora", "both"),
    Mix({Stack("ia3", "lora"): 0.3, Stack("both", "ssf"): 0.4, "lora-in": 0.2}),
)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_merged_equals_active(name: str) -> None:
    kit, batch = kit_with(name, **METHODS)
    bits = {key: value.clone() for key, value in kit.base.state_dict().items()}
    for strengths in ({}, {"ia3": 0.6, "lora": 0.5, "lora-in": 0.7, "full": 0.0}):
        for adapter, strength in strengths.items():
            kit.strength(adapter, strength)
        for entry in ENTRIES:
            with kit.use(entry):
                want = run(kit, batch)
            kit.merge(entry)
            merged = run(kit, batch)
            kit.unmerge()
            assert_same(merged, want, what=f"merged {entry}")
            assert_same(run(kit.merged_copy(entry, check_saveable=False), batch), want, what=f"a copy of {entry}")
    assert all(torch.equal(value, bits[key]) for key, value in kit.base.state_dict().items())


def test_what_does_not_fold_is_named() -> None:
    kit, _ = kit_with("llama", **METHODS, prefix=PrefixTuning(length=3))
    kit.add("head", LoRA(rank=2), heads={"lm_head": nn.Sequential(nn.Linear(48, 99), nn.Tanh())})
    for entry, message in (
        (Mix({"lora": 0.5, "prefix": 0.5}), r"Mix\(\{'lora': 0.5, 'prefix': 0.5\}\).*virtual tokens"),
        (Stack("lora", "prefix"), "'lora' then 'prefix'.*virtual tokens"),
        (Mix({"lora": 0.5, "head": 0.5}), "lm_head.*a head in part .* is a blend of two modules"),
    ):
        for merge in (kit.merge, kit.merged_copy):
            with pytest.raises(NotMergeable, match=f"(?s){message}"):
                merge(entry)
    assert not kit.merged
    with pytest.raises(UnknownAdapter, match="'lorra'"):
        kit.merged_copy(Mix({"lorra": 1.0}))
    with pytest.raises(RouteError, match="cannot use"):
        kit.merge(["lora", None])  # type: ignore[arg-type]


def test_the_names_of_a_merged_mix() -> None:
    kit, _ = kit_with("llama", **METHODS)
    kit.merge("norms", Mix({"lora": 0.7, Stack("dora", "bitfit"): 0.4}))
    assert kit.merged == ("norms", "lora", "dora", "bitfit")


@pytest.mark.parametrize("has_bias", [False, True])
def test_heads_that_are_linears_in_part(has_bias: bool) -> None:
    kit, batch = kit_with("bert", on_head=LoRA(rank=2, alpha=3, targets="head"))
    for name in ("a", "b"):
        head = nn.Linear(48, 5, bias=has_bias)
        untrivial(kit.add(name, LoRA(rank=2, alpha=3), heads={"classifier": head}, seed=0))
    for entry, strength in (
        (Mix({"a": 0.6, "b": 0.3}), 1.0),
        ("a", 0.7),
        (Stack("a", "on_head"), 1.0),
        (Stack("a", Mix({"b": 0.5, "on_head": 0.8})), 0.6),
    ):
        kit.strength("a", strength)
        with kit.use(entry):
            want = run(kit, batch)
        kit.merge(entry)
        assert_same(run(kit, batch), want, what=f"merged {entry}")
        kit.unmerge()
        assert_same(run(kit.merged_copy(entry), batch), want, what=f"a copy of {entry}")
