"""The weights that compositions give their parts, by part, layer and position, and their picture."""

from __future__ import annotations

import pytest
import torch

import kitout
from kitout import IA3, BitFit, Composition, Fusion, Gated, LoRA, Method, Mixture
from kitout.errors import ConfigError
from kitout.evaluate.report.plots import plot_part_weights
from laws.activate import assert_same, kit_with, put_on, run


@pytest.mark.parametrize("species", ["llama", "vit"])
def test_weights_by_part_layer_and_position(species: str) -> None:
    kit, batch = kit_with(species, a=LoRA(rank=2, targets="attn.q attn.v"), b=IA3(targets="attn.q attn.v"))
    put_on(kit, Fusion(of=("a", "b"), dropout=0.5), "f")
    put_on(kit, Mixture(of=("a", "b"), init=(0.7, -0.2), per="layer"), "m")
    put_on(kit, Gated(of=("a", "b")), "g")
    kit.train()
    for name in ("f", "m", "g"):
        found = kitout.attention(kit, name, batch)
        assert found.parts == ("a", "b")
        assert found.weights.shape[:3] == (2, len(found.layers), 2)
        assert found.weights.isfinite().all()
        assert set(found.by_site) == {site.key for site in kit[name].sites}
        assert all(weights.shape[-1] == 2 for weights in found.by_site.values())
        assert plot_part_weights(found.parts, found.layers, found.weights).startswith(b"\x89PNG")
        if name == "f":
            assert_same(found.weights.sum(0), torch.ones(found.weights.shape[1:]))
        if name == "m":
            assert_same(found.weights[:, 0, 0, 0], kit["m"].shared[next(iter(kit["m"].shared))])
        if name == "g":
            assert ((found.weights > 0) & (found.weights < 1)).all()
    assert kit.training
    assert all("combine" not in vars(delta) for name in "fmg" for _, delta in kit[name].site_deltas())
    kit.eval()
    with kit.use("f"):
        run(kit, batch)


@pytest.mark.parametrize(("species", "method"), [("t5", LoRA(rank=2)), ("vit", BitFit())])
def test_sites_of_one_layer_with_different_numbers_of_positions(species: str, method: Method) -> None:
    """Cross-attention has positions of two texts; what is in no block may lie before and behind the class token."""
    kit, batch = kit_with(species, a=method, b=method)
    put_on(kit, Mixture(of=("a", "b"), init=(0.7, -0.2)), "m")
    found = kitout.attention(kit, "m", batch)
    some = found.weights[:, :, :, 0]
    assert some.isfinite().all()
    assert_same(
        some[0] - some[1], (kit["m"].shared[next(iter(kit["m"].shared))] @ torch.tensor([1.0, -1.0])).expand_as(some[0])
    )


def test_what_has_no_weights_is_refused() -> None:
    kit, batch = kit_with("llama", a=LoRA(rank=2))
    kit.add("c", Composition(route="a"))
    for name in ("a", "c"):
        with pytest.raises(ConfigError, match="Mixture, Fusion and Gated"):
            kitout.attention(kit, name, batch)
    with pytest.raises(ConfigError, match="found"):
        plot_part_weights(("a",), ("0",), torch.zeros(1, 2))
