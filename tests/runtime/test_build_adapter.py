"""A new adapter: which sites it gets, and where a method has none."""

from __future__ import annotations

import pytest
import torch

import kitout
from kitout import IA3, Houlsby, LoRA, Method, PrefixTuning
from kitout.errors import ConfigError, TargetError
from laws.activate import kit_with, run
from zoo import ZOO


def test_projections_that_share_an_input_share_a_site() -> None:
    kit, batch = kit_with("gpt2", i=IA3(targets="in:attn.q in:attn.k"))
    assert len(kit["i"].sites) == len(kit["i"].deltas) == 2
    assert kit.num_parameters("i").trainable == sum(s.d_out for s in kit["i"].sites)
    run(kit, batch)


def test_lora_is_refused_at_inputs_and_sublayers() -> None:
    kit = kitout.attach(ZOO["llama"].build())
    with pytest.raises(ConfigError, match="adapted at its input"):
        kit.add("a", LoRA(dora=True, targets="in:attn.o"))
    with pytest.raises(TargetError, match="changes a projection"):
        kit.add("b", LoRA(targets="sub.mlp"))
    assert kit.names == []


@pytest.mark.parametrize("species", ["bert", "gpt2"])
def test_a_map_behind_a_module_without_parameters_is_where_its_block_is(species: str) -> None:
    kit = kitout.attach(ZOO[species].build())
    kit.base.to("meta")
    adapter = kit.add("a", Houlsby(width=2, norms=False))
    assert not all(list(site.module.parameters()) for site in adapter.sites)
    assert {p.device.type for p in adapter.parameters()} == {"meta"}


@pytest.mark.parametrize("method", [LoRA(rank=2), Houlsby(width=2), PrefixTuning(length=2, encoder=3)], ids=repr)
def test_a_seed_means_the_same_values_under_any_default_device(method: Method) -> None:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", method, seed=7)
    with torch.device("meta"):  # as "cuda" would be, with a generator of its own
        kit.add("b", method, seed=7)
    for a, b in zip(kit["a"].parameters(), kit["b"].parameters(), strict=True):
        assert torch.equal(a, b)
