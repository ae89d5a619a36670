"""Experts by structure: fused into parameters or as lists of modules, their routers, and linears that are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import kitout
from kitout import IA3, LoRA
from kitout.base.find.find import find_sites
from kitout.base.find.module_shapes import leaf_shape
from kitout.cli.inspect import render_text
from kitout.errors import RouteError, TargetError
from zoo import _GQA, EXTRA, D, _hf

MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": EXTRA["mixtral"].build,
    "phimoe": _hf("PhimoeForCausalLM", "PhimoeConfig", **_GQA, num_local_experts=4),  # its router is a linear's class
    "llama4": _hf(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **_GQA,
        num_local_experts=4,
        head_dim=16,
        intermediate_size_mlp=64,
        interleave_moe_layer_step=1,
    ),
    "gpt-oss": _hf("GptOssForCausalLM", "GptOssConfig", **_GQA, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": _hf(
        "JetMoeForCausalLM",
        "JetMoeConfig",
        vocab_size=99,
        hidden_size=D,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=12,
        intermediate_size=80,
        num_local_experts=4,
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_are_reported_with_their_share(name: str) -> None:
    model = MIXTURES[name]()
    kit = kitout.attach(model)
    fused = [p for p in model.parameters() if p.ndim == 3]
    assert fused
    share = sum(model.get_parameter(n).numel() for n in kit.survey.fused_experts) / sum(
        p.numel() for p in model.parameters()
    )
    assert {id(p) for p in fused} <= {id(model.get_parameter(n)) for n in kit.survey.fused_experts}
    lines = [line for line in str(kit).splitlines() if "experts" in line]
    assert len(lines) == 1
    assert f"{100 * share:.1f} % of the model" in lines[0]
    assert lines[0] in render_text(find_sites(model))


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_has_no_router(name: str) -> None:
    kit = kitout.attach(MIXTURES[name]())
    routers = [s for s in kit.survey.sites if s.is_router]
    assert len(routers) >= 2
    assert not {s.path for s in routers} & {s.path for s in kit.sites("all-linear")}


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "llama4"])
def test_lora_over_a_router_that_returns_a_choice_is_refused(name: str) -> None:
    kit = kitout.attach(MIXTURES[name]())
    router = next(s.path for s in kit.survey.sites if s.is_router)
    with pytest.raises(TargetError, match="does more than multiply by its weight"):
        kit.add("a", LoRA(rank=2, targets=router))


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "gpt-oss"])
def test_ia3_on_a_mixture_says_why_not_and_what_to_write(name: str) -> None:
    kit = kitout.attach(MIXTURES[name]())
    with pytest.raises(TargetError, match=r"experts fused into parameters .*targets='attn.k attn.v'") as error:
        kit.add("a", IA3())
    assert "down_proj" in str(error.value)
    kit.add("a", IA3(targets="attn.k attn.v"))


def test_a_model_without_experts_says_nothing_of_them() -> None:
    for name in ("siglip", "olmo2", "gptj"):
        kit = kitout.attach(EXTRA[name].build())
        assert not kit.survey.fused_experts
        assert "expert" not in str(kit)


class BlockDiagonal(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        halves = zip(x.chunk(2, -1), self.weight.chunk(2, 0), strict=True)
        return torch.cat([h @ w.chunk(2, 1)[0].T for h, w in halves], -1)


class Grouped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gi,goi->...go", x, self.weight.view(2, -1, self.in_features))


class Choice(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Unfused(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("cls", [Grouped, Choice])
def test_a_linear_that_computes_something_else_is_no_linear(cls: type[nn.Linear], device: str) -> None:
    leaf = leaf_shape(cls(8, 4, device=device))
    assert leaf is not None
    assert leaf.kind == "other"


def test_values_tell_a_block_diagonal_product_from_a_linear() -> None:
    block_diagonal, unfused = leaf_shape(BlockDiagonal(8, 4)), leaf_shape(Unfused(8, 4))
    assert block_diagonal is not None
    assert block_diagonal.kind == "other"
    assert unfused is not None
    assert unfused.kind == "linear"


def test_experts_that_the_probe_did_not_reach_are_alive() -> None:
    specimen = EXTRA["switch"]
    kit = kitout.attach(specimen.build())
    assert not kit.survey.unused
    assert kit.survey.unreached
    adapter = kit.add("a", LoRA(rank=2, targets="all-linear"), seed=0)
    experts = [s for s in adapter.sites if ".experts." in s.path]
    assert len(experts) == 2 * 2 * 6
    assert {s.batch_relation for s in experts} == {"none"}  # rows do not follow the batch there
    with kit.use(["a", None]), pytest.raises(RouteError, match="does not follow the batch"):
        kit(**specimen.batch(2, 0))


def test_experts_of_another_kind_of_list() -> None:
    config = hf.NllbMoeConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, num_experts=8,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_sparse_step=2, decoder_sparse_step=2,
    )  # fmt: skip
    kit = kitout.attach(hf.NllbMoeForConditionalGeneration(config))
    adapter = kit.add("a", LoRA(rank=2, targets="all-linear"))
    assert not adapter.left_out
    assert sum(".experts." in s.path for s in adapter.sites) == 2 * 2 * 8
