"""Convolutions that a cached step computes by hand: what changes them acts in every step, and rows are refused where a
block keeps its state for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import kitout
from kitout import SSF, BitFit, Method
from kitout.errors import RouteError
from laws.activate import put_on
from zoo import VOCAB

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": None}
MODELS: dict[str, Any] = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4)),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            **SIZES,
            intermediate_size=64,
            num_attention_heads=2,
            lru_width=32,
            attention_window_size=16,
            block_types=["recurrent", "attention"],
        )
    ),
}


@pytest.mark.parametrize("method", [BitFit(), SSF()], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cached_steps_see_the_adapter(name: str, method: Method) -> None:
    torch.manual_seed(0)
    kit = kitout.attach(MODELS[name]().eval())
    convolutions = [s for s in kit.survey.sites if s.kind == "conv"]
    assert [s.port for s in convolutions] == ["weight"] * len(convolutions)
    assert convolutions
    put_on(kit, method, "a")
    ids = torch.tensor([[5, 9, 7, 3]])
    with kit.use("a"), torch.no_grad():
        cached = kit.generate(ids, max_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True)
        whole = kit(input_ids=cached.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(cached.scores, 1), whole[:, 3:], rtol=1e-4, atol=1e-4)


def test_a_block_that_keeps_its_state_takes_one_adapter_for_all_rows() -> None:
    kit = kitout.attach(MODELS["recurrent_gemma"]().eval())
    put_on(kit, BitFit(), "a")
    with kit.use(["a", None]), pytest.raises(RouteError, match="keeps values of its last run"):
        kit(input_ids=torch.tensor([[5, 9, 7], [3, 4, 5]]), use_cache=False)
