"""A sublayer that answers with the tokens of all rows in one dimension, and inputs that are strided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import kitout
from kitout import AdaptFormer, Houlsby, LoRA, Method, ParallelAdapter
from laws.activate import assert_same, put_on, run
from zoo import VOCAB


@pytest.fixture(scope="module")
def kit() -> Any:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        pad_token_id=0,
    )
    return kitout.attach(transformers.Llama4ForCausalLM(config).eval())


@pytest.mark.parametrize("method", [Houlsby(width=4), ParallelAdapter(width=4), AdaptFormer(width=4)], ids=str)
def test_rows_are_as_alone(kit: Any, method: Method) -> None:
    put_on(kit, method, "a")
    put_on(kit, method, "b", seed=1)
    ids = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))
    with kit.use(["a", None, "b"]):
        together = run(kit, {"input_ids": ids})
    for i, name in enumerate(["a", None, "b"]):
        with kit.use(name):
            assert_same(together[i : i + 1], run(kit, {"input_ids": ids[i : i + 1]}))
    kit.remove("a")
    kit.remove("b")


def test_gradients_of_rows_over_a_strided_input() -> None:
    class Transposed(torch.nn.Module):
        """Tokens come first inside, as in speech models and ProphetNet."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x.transpose(0, 1).contiguous().transpose(0, 1))
            return y

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model: Any = transformers.BertModel(config).eval()
    model.encoder.layer[0].output.dense = Transposed(model.encoder.layer[0].output.dense)
    kit = kitout.attach(model)
    for seed, name in enumerate("ab"):
        put_on(kit, LoRA(rank=2 + seed, targets="attn.q *.inner"), name, seed=seed)
    ids = torch.randint(3, VOCAB, (4, 5), generator=torch.Generator().manual_seed(0))
    with kit.use(["a", "a", None, "b"]):  # a run of two rows has no flat view in such a layout
        kit(input_ids=ids).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None for name in "ab" for p in kit[name].parameters())
