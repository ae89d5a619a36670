"""State-space models: blocks are found where nothing attends, and LoRA sits at their linears."""

from __future__ import annotations

import pytest
import torch
import transformers

import kitout
from zoo import VOCAB, out, text_batch


@pytest.mark.parametrize("name", ["MambaForCausalLM", "Mamba2ForCausalLM"])
def test_lora_where_nothing_attends(name: str) -> None:
    heads = {"num_heads": 8, "head_dim": 12, "n_groups": 1} if "2" in name else {}
    config = getattr(transformers, name).config_class(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, state_size=4, **heads
    )
    torch.manual_seed(0)
    kit = kitout.attach(getattr(transformers, name)(config).eval())
    assert [(t.depth, t.embedder) for t in kit.survey.towers] == [(2, None)]
    kit.add("x", kitout.LoRA(rank=4, targets="in_proj out_proj"), seed=0)
    for p in kit["x"].parameters():
        torch.nn.init.normal_(p, std=0.3)
    batch = {"input_ids": text_batch(2)["input_ids"]}
    base = out(kit(**batch))
    with kit.use("x"):
        active = out(kit(**batch))
    active.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in kit["x"].parameters())
    assert not torch.allclose(active, base, atol=1e-3)
    kit.merge("x")
    torch.testing.assert_close(out(kit.base.eval()(**batch)), active.detach(), rtol=1e-3, atol=1e-4)
