"""A Mix of adapters that fold is what `kitout.combine` makes of them; the arithmetic itself: `test_all_pairs.py`."""

from __future__ import annotations

import itertools

import pytest
import torch

import kitout
from fuse.parts import kit_of
from kitout import IA3, BitFit, FullFineTuning, Kit, LoRA, Mix
from kitout.errors import NotMergeable
from zoo import ZOO, out

METHODS = {
    "lora": LoRA(rank=3, alpha=5, targets="attn.* mlp.*"),
    "in": LoRA(rank=2, targets="in:attn.* in:mlp.*"),
    "dora": LoRA(rank=3, dora=True, targets="attn.* mlp.*"),
    "ia3": IA3(targets="in:attn.* in:mlp.* attn.*"),
    "full": FullFineTuning(targets="attn.* mlp.*"),
    "bitfit": BitFit(),
}


@pytest.fixture(scope="module")
def kits() -> dict[str, Kit]:
    return {}


@pytest.mark.parametrize("species", ["gpt2"])
@pytest.mark.parametrize("pair", list(itertools.combinations(METHODS, 2)), ids="-".join)
def test_a_mix_is_the_arithmetic(kits: dict[str, Kit], species: str, pair: tuple[str, str]) -> None:
    kit = kits.setdefault(species, kits.get(species) or kit_of(species, METHODS))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in ZOO[species].batch(2, 0).items()}
    weights = {pair[0]: 0.7, pair[1]: -0.4}
    refusal = ""
    try:
        kitout.combine(kit, "c", weights, to="dense")
    except NotMergeable as error:
        refusal = str(error)
    if refusal:
        assert "bitfit" in pair, refusal
        assert "bias" in refusal
        pytest.skip("a new bias")
    with torch.no_grad():
        with kit.use("c"):
            expected = out(kit(**batch))
        with kit.use(Mix(weights)):
            found = out(kit(**batch))
    kit.remove("c")
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
