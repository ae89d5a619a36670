"""Token tables: heads in their place, and tables that change under an attached kit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kitout
from kitout import BitFit, FullFineTuning, LoRA, Method, PrefixTuning, PromptTuning
from kitout.errors import ConfigError, UnusedSite
from laws.activate import assert_same, put_on, run, untrivial
from zoo import VOCAB, ZOO, D, Specimen, out, rows_of

DECODERS = [ZOO[name] for name in ("llama", "llama-tied", "gpt2")]
BIGGER = VOCAB + 16


def tables_of(model: Any) -> tuple[str, str]:
    """Paths of the input and of the output table."""
    paths = {m: path for path, m in model.named_modules()}
    return paths[model.get_input_embeddings()], paths[model.get_output_embeddings()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["input", "output", "both"])
@pytest.mark.parametrize("specimen", DECODERS, ids=lambda s: s.name)
def test_a_table_of_its_own(specimen: Specimen, which: str, dtype: torch.dtype) -> None:
    """A table in place of the model's: acts, trains, has rows, merges; fp32 values over a base of any dtype."""
    kit = kitout.attach(specimen.build().to(dtype))
    embed, output = tables_of(kit.base)
    heads: dict[str, nn.Module] = {}
    if which != "output":
        heads[embed] = nn.Embedding(VOCAB, D)
    if which != "input":
        heads[output] = nn.Linear(D, VOCAB, bias=False)
    kit.add("a", LoRA(rank=2), heads=heads)
    untrivial(kit["a"])
    batch = specimen.batch(2, 0)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    with kit.use("a"):
        alone = run(kit, batch)
        assert alone.dtype is dtype
        out(kit(**batch)).float().square().mean().backward()
    assert all(p.grad is not None for head in heads.values() for p in head.parameters())
    with kit.use(["a", None]):
        mixed = run(kit, batch)
    with kit.use("a"):
        assert_same(mixed[:1], run(kit, rows_of(batch, 0)), tolerance)
    with kit.use(None):
        assert_same(mixed[1:], run(kit, rows_of(batch, 1)), tolerance)
    copied = kit.merged_copy("a")
    assert {p.dtype for p in copied.parameters()} == {dtype}
    assert_same(run(copied, batch), alone, tolerance)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_table_that_only_lends_its_values_takes_no_head(name: str) -> None:
    kit = kitout.attach(ZOO[name].build())
    path, _ = tables_of(kit.base)
    with pytest.raises(UnusedSite, match=f"{path} never runs"):
        kit.add("a", LoRA(rank=2), heads={path: nn.Embedding(VOCAB, D)})
    kit.add("b", LoRA(rank=2), heads={"lm_head": nn.Linear(D, VOCAB, bias=False)})


@pytest.mark.parametrize("method", [LoRA(rank=2), BitFit(), PrefixTuning(length=2), PromptTuning(length=2)], ids=str)
@pytest.mark.parametrize("specimen", DECODERS, ids=lambda s: s.name)
def test_a_resized_table_leaves_other_adapters_as_they_were(specimen: Specimen, method: Method) -> None:
    kit = kitout.attach(specimen.build())
    put_on(kit, method, "a")
    batch = specimen.batch(2, 0)
    with kit.use("a"):
        before = run(kit, batch)
        kit.base.resize_token_embeddings(BIGGER)
        assert_same(run(kit, batch)[..., :VOCAB], before)
    assert not any(p.requires_grad for p in kit.base.parameters())
    ids = torch.tensor([[3, BIGGER - 1, 4]])
    base = run(kit, {"input_ids": ids})
    for name, targets in (("in", "embed"), ("out", "head")):  # new adapters see the tables as they are now
        put_on(kit, LoRA(rank=2, targets=targets), name)
        with kit.use(name):
            tuned = run(kit, {"input_ids": ids})
        assert tuned.shape == base.shape
        assert not torch.equal(tuned, base)
        kit.merge(name)
        assert_same(run(kit, {"input_ids": ids}), tuned)
        kit.unmerge()
    kit.detach()


@pytest.mark.parametrize("method", [LoRA(rank=2, targets="embed"), LoRA(rank=2, targets="head"), FullFineTuning()])
@pytest.mark.parametrize("specimen", DECODERS[:2], ids=lambda s: s.name)
def test_a_table_with_an_adapter_is_not_resized(specimen: Specimen, method: Method) -> None:
    kit = kitout.attach(specimen.build())
    put_on(kit, method, "a")
    batch = specimen.batch(2, 0)
    with kit.use("a"):
        before = run(kit, batch)
        with pytest.raises(ConfigError, match=r"resize_token_embeddings: adapter 'a' has values for .*kit.remove"):
            kit.base.resize_token_embeddings(BIGGER)
        with pytest.raises(ConfigError, match="set_input_embeddings"):
            kit.base.set_input_embeddings(nn.Embedding(VOCAB, D))
        kit.base.resize_token_embeddings(VOCAB)  # its size already
        assert torch.equal(run(kit, batch), before)
    kit.remove("a")
    kit.base.resize_token_embeddings(BIGGER)
    assert run(kit, batch).shape[-1] == BIGGER
