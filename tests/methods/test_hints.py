"""A refusal says what this model can do instead, and nothing that it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers as hf
from torch import nn

import kitout
from kitout import VPT, AdaptFormer, PrefixTuning, PromptTuning
from kitout.errors import TargetError
from kitout.method import Method
from zoo import ZOO

SIZES = {"vocab_size": 99, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 80}
WINDOW = {**SIZES, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "sliding_window": 4}


def refusal(model: nn.Module, method: Method) -> str:
    with pytest.raises(TargetError) as error:
        kitout.attach(model).add("a", method)
    return str(error.value)


@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        ("BloomForCausalLM", "BloomConfig", {"vocab_size": 99, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
        ("GPTJForCausalLM", "GPTJConfig", {"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
        ("DebertaV2Model", "DebertaV2Config", SIZES),
    ],
)
def test_a_kernel_that_the_model_lacks_is_not_offered(model: str, config: str, settings: dict[str, Any]) -> None:
    message = refusal(getattr(hf, model)(getattr(hf, config)(**settings)), PrefixTuning())
    assert "writes its attention out" in message
    assert "sdpa" not in message


def test_layers_with_full_attention_are_named_where_there_are_any() -> None:
    mixed = refusal(hf.Gemma2ForCausalLM(hf.Gemma2Config(**WINDOW)), PrefixTuning(length=8))
    assert "choose layers='1', with full attention" in mixed
    kinds = ["sliding_attention"] * 2
    windows = refusal(hf.Gemma2ForCausalLM(hf.Gemma2Config(**WINDOW, layer_types=kinds)), PrefixTuning(length=8))
    assert windows.endswith("shorten it")


def test_stacks_and_places_are_those_of_the_model() -> None:
    assert "reads an image" in refusal(ZOO["llama"].build(), VPT())
    kit = kitout.attach(ZOO["bart"].build())
    kit.add("a", PromptTuning(length=2, stacks="decoder"))
    message = refusal(ZOO["vit"].build(), PromptTuning(length=2))
    assert "stacks=" not in message


def test_sublayers_that_were_not_seen_are_not_offered() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**WINDOW, **experts))
    kit = kitout.attach(model)
    kit.add("a", AdaptFormer(width=2))
    hidden = [s for s in kit.survey.sites if s.role != "sub.mlp"]
    with pytest.raises(TargetError) as error:
        AdaptFormer().sites(replace(kit.survey, sites=tuple(hidden)))
    assert "sub.mlp" in str(error.value)
    assert "targets=" not in str(error.value)
