"""A mixture starts at its weights, trains nothing else, merges as a Mix and travels with its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kitout import IA3, FullFineTuning, LoRA, Mix, Mixture, PartialFineTuning, PrefixTuning
from kitout.errors import ConfigError, RouteError
from laws.activate import assert_same, fresh_kit, kit_with, loss_of, put_on, run
from zoo import ZOO

WEIGHTS = {"a": 0.5, "b": -0.3, "c": 0.4, "d": 0.7}
PARTS = {
    "a": LoRA(rank=2, targets="attn.q in:mlp.down"),
    "b": IA3(),
    "c": FullFineTuning(layers="last:1"),
    "d": PartialFineTuning(part="norms"),
}


@pytest.mark.parametrize("species", ["gpt2", "vit"])
def test_it_starts_at_its_weights_and_merges_as_a_mix(species: str) -> None:
    kit, batch = kit_with(species, **PARTS)
    with kit.use(Mix(WEIGHTS)):
        want = run(kit, batch)
    for per, size in (("model", 4), ("layer", 4 * 3), ("site", None)):
        name = f"per-{per}"
        adapter = kit.add(name, Mixture(of=tuple(WEIGHTS), init=tuple(WEIGHTS.values()), per=per))
        assert size is None or kit.num_parameters(name).total <= size + 4
        with kit.use(name):
            assert_same(run(kit, batch), want)
        with kit.use([name, None]):
            assert_same(run(kit, batch)[:1], want[:1])
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.linspace(-0.3, 0.2, 4))
        kit.strength(name, 0.8)
        with kit.use(name):
            value = run(kit, batch)
        kit.merge(name)
        assert_same(run(kit, batch), value)
        kit.unmerge()


def test_training_it_moves_its_own_weights_alone(tmp_path: Path) -> None:
    kit, batch = kit_with("llama", a=LoRA(rank=2), b=IA3())
    adapter = kit.add("m", Mixture(of=("a", "b"), per="layer", softmax=True, init=(0.9, 0.1)))
    before = {name: value.clone() for name, value in kit.state_dict().items()}
    with kit.use(Mix({"a": 0.9, "b": 0.1})):
        want = run(kit, batch)
    kit.use("m")
    assert_same(run(kit, batch), want)
    trained = [p for p in kit.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapter.parameters()}
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    loss_of(kit(**batch)).backward()
    optimizer.step()
    moved = {name for name, value in kit.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "@m." in name}
    value = run(kit, batch)
    kit.save("m", tmp_path / "m")
    other = fresh_kit(ZOO["llama"])
    other.load(tmp_path / "m")
    assert sorted(other.names) == ["a", "b", "m"]
    assert not any(p.requires_grad for name in "ab" for p in other[name].parameters())
    with other.use("m"):
        assert torch.equal(run(other, batch), value)


def test_what_it_cannot_weigh_is_refused() -> None:
    kit, _ = kit_with("llama", a=LoRA(rank=2), p=PrefixTuning(length=2))
    with pytest.raises(RouteError, match="'p' has virtual tokens"):
        kit.add("m", Mixture(of=("a", "p")))
    with pytest.raises(RouteError, match="names no adapter"):
        kit.add("m", Mixture())
    for settings in (
        {"of": ("a", "a")},
        {"of": ("a",), "init": (0.5, 0.5)},
        {"of": ("a",), "softmax": True, "init": (0.5,)},
        {"of": ("a",), "layers": "last:1"},
    ):
        with pytest.raises(ConfigError):
            Mixture(**settings)
    put_on(kit, Mixture(of=("a",)), "m")
    put_on(kit, Mixture(of=("m", "a")), "n")  # a composition of compositions
    with pytest.raises(RouteError, match="'a' is a part of"):
        kit.remove("a")
