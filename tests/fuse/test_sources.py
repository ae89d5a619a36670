"""Compositions as sources of arithmetic: the change of what they are made of, in the factors where those add up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import kitout
from fuse.parts import add, change, distance, kit_of
from kitout import (
    IA3,
    Average,
    BitFit,
    Composition,
    FullFineTuning,
    Fusion,
    Gated,
    Kit,
    LoRA,
    Mix,
    Mixture,
    Only,
    PrefixTuning,
    Stack,
)
from kitout.errors import ConfigError, NotMergeable
from zoo import ZOO, out

PARTS = {
    "a": LoRA(rank=3, alpha=5),
    "b": LoRA(rank=2, rslora=True, targets="all-linear"),
    "in": LoRA(rank=2, targets="in:mlp.down attn.q"),
    "bias": LoRA(rank=2, lora_bias=True),
    "ia3": IA3(),
    "dora": LoRA(rank=2, dora=True),
    "full": FullFineTuning(targets="attn.o norm"),
    "prefix": PrefixTuning(length=2),
}
OF_LORAS = {  # added up
    "stack": Composition(route=Stack("a", "b")),
    "mix": Composition(route=Mix({"a": 0.5, "b": -0.7, "in": 0.3})),
    "in-first": Composition(route=Stack("in", Mix({"a": 0.5, "b": 1.2}))),
    "only": Composition(route=Only("b", layers="last:1")),
    "mixture": Mixture(of=("a", "b", "bias"), init=(0.5, 0.3, -0.2), per="layer"),
    "nested": Composition(route=Mix({"mixture": 0.5, Stack("stack", "a"): 1.0})),
    "of-nested": Composition(route=Only("nested", layers="0")),
}
OF_OTHERS = {
    "in-last": Composition(route=Stack("b", "in")),
    "scaled": Composition(route=Stack("b", "ia3")),
    "blend": Composition(route=Mix({Stack("b", "ia3"): 0.5, "dora": 0.3})),
    "softmax": Mixture(of=("a", "full", "ia3"), softmax=True, per="site"),
    "mixtures": Mixture(of=("stack", "mixture", "dora")),
}
WITHOUT_WEIGHTS = {
    "fusion": (
        Fusion(of=("a", "dora")),
        "'fusion' is a Fusion, which weighs its parts anew.*a Mix or a Mixture of 'a', 'd",
    ),
    "gated": (Gated(of=("a", "b")), "'gated' is a Gated, which weighs its parts anew for every input"),
    "average": (Composition(route=Average({"a": 0.5, "b": 0.5})), "averages whole outputs.*write a Mix of .*'a': 0.5"),
    "tokens": (Composition(route=Stack("a", "prefix")), "'tokens' has the part 'prefix', a PrefixTuning.*names: 'a'"),
    "inner": (Composition(route=Stack("a", "fusion")), "'inner': 'fusion' is a Fusion"),
}


@pytest.fixture(scope="module")
def kit() -> Kit:
    kit = kit_of("gpt2", PARTS)
    for name, method in {**OF_LORAS, **OF_OTHERS}.items():
        add(kit, name, method)
    kit.strength("mixture", 0.8)
    kit.strength("only", 0.6)
    return kit


@pytest.fixture(autouse=True)
def _nothing_stays(kit: Kit) -> Iterator[None]:
    yield
    for name in {"c", "twin"} & set(kit.names):
        kit.remove(name)


@torch.no_grad()
def logits(kit: Kit, name: str | None) -> torch.Tensor:
    with kit.use(name):
        return out(kit(**ZOO["gpt2"].batch(2, 0)))


@pytest.mark.parametrize("name", [*OF_LORAS, *OF_OTHERS])
def test_a_composition_alone_is_that_composition(kit: Kit, name: str) -> None:
    fused = kitout.combine(kit, "c", {name: 1.0})
    assert type(kit["c"].method) is (LoRA if name in OF_LORAS else FullFineTuning)
    assert fused.residual.total <= 1e-9
    want = logits(kit, name)
    assert (logits(kit, "c") - want).abs().max() <= 1e-9
    with torch.no_grad():
        merged = out(kit.merged_copy(name, check_saveable=False)(**ZOO["gpt2"].batch(2, 0)))
        kit.merge(name)
        in_place = out(kit(**ZOO["gpt2"].batch(2, 0)))
        kit.unmerge()
    assert (merged - want).abs().max() <= 1e-9
    assert (in_place - want).abs().max() <= 1e-9


def test_a_part_that_occurs_twice_has_its_rank_once(kit: Kit) -> None:
    kitout.combine(kit, "c", {"nested": 1.0}, to="exact")
    rank = kit["c"].method.rank
    assert isinstance(rank, dict)
    assert max(rank.values()) == 2 * 3 + 2 + 2 * 2  # a at q and v, b at all of q, k and v, bias at q and v


def test_what_cancels_inside_takes_no_part(kit: Kit) -> None:
    add(kit, "twin", Composition(route=Mix({"a": 0.0, "b": 0.0})))
    kitout.combine(kit, "c", {"twin": 1.0, "a": 0.5})
    assert kit["c"].method.rank == 3
    assert distance(change(kit, {"c": 1}), change(kit, {"a": 0.5})) <= 1e-12
    kit.remove("c")
    with pytest.raises(ConfigError, match="would change nothing"):
        kitout.combine(kit, "c", {"twin": 1.0})


@pytest.mark.parametrize("name", ["mixture", "nested", "blend"])
def test_less_itself_it_is_the_base(kit: Kit, name: str) -> None:
    add(kit, "twin", Composition(route=name))
    fused = kitout.combine(kit, "c", {name: 1.0, "twin": -1.0})
    assert (logits(kit, "c") - logits(kit, None)).abs().max() <= 1e-9
    assert fused.residual.total == 0.0


@pytest.mark.parametrize("pair", [("nested", "b"), ("mixture", "scaled"), ("blend", "only")], ids="-".join)
@pytest.mark.parametrize("how", ["sum", "ties", "slerp", "stock"])
def test_with_others(kit: Kit, pair: tuple[str, str], how: str) -> None:
    """As single adapters with the same changes."""
    weights = dict.fromkeys(pair, 1.0 if how == "stock" else 0.7)
    singles = {}
    for name in pair:
        kitout.combine(kit, f"{name}-copy", {name: 1.0}, to="dense")
        singles[f"{name}-copy"] = weights[name]
    kitout.combine(kit, "c", weights, how=how)
    kitout.combine(kit, "twin", singles, how=how)
    assert distance(change(kit, {"c": 1}), change(kit, {"twin": 1})) <= 1e-9
    if how == "sum":
        assert distance(change(kit, {"c": 1}), change(kit, weights)) <= 1e-9
    for name in singles:
        kit.remove(name)


@pytest.mark.parametrize("name", ["mix", "blend"])
def test_cut_to_a_rank(kit: Kit, name: str) -> None:
    fused = kitout.convert(kit, name, "c", to=LoRA(rank=3), max_residual=1, drop="biases")
    assert 0 < fused.residual.total < 1
    assert abs(fused.residual.total - distance(change(kit, {"c": 1}), change(kit, {name: 1}))) <= 1e-5
    with pytest.raises(ConfigError, match=r"LoRA\(rank=\d+\) would do"):
        kitout.convert(kit, name, "d", to=LoRA(rank=1), drop="biases")


def test_what_no_weights_hold_names_the_part_and_what_to_write(kit: Kit) -> None:
    for name, (method, message) in WITHOUT_WEIGHTS.items():
        add(kit, name, method)
        for fuse in (
            lambda name=name: kitout.combine(kit, "c", {"a": 1.0, name: 1.0}),
            lambda name=name: kitout.convert(kit, name, "c", to="dense"),
        ):
            with pytest.raises(NotMergeable, match=f"(?s){message}"):
                fuse()
        for merge in (kit.merge, kit.merged_copy):
            with pytest.raises(NotMergeable, match=f"'{name}'"):
                merge(name)
    assert "c" not in kit.names
    assert not kit.merged
    with torch.no_grad():
        next(kit["mixture"].parameters())[0] = float("nan")
    with pytest.raises(NotMergeable, match="mixture holds NaN"):
        kit.merge("mixture")
    with torch.no_grad():
        next(kit["mixture"].parameters())[0] = 0.5


def test_the_head_that_a_composition_ends_with_goes_along() -> None:
    kit = kit_of("bert", {"plain": LoRA(rank=2), "bias": BitFit()}, torch.float32)
    for seed, name in enumerate("ab"):
        kit.add(name, LoRA(rank=2), heads={"classifier": nn.Linear(48, 5)}, seed=seed)
    kit.add("stack", Composition(route=Stack("a", Mix({"plain": 0.5}), "b")))
    kit.add("own", Composition(route=Mix({"bias": 0.5, "plain": 0.5})), heads={"classifier": nn.Linear(48, 2)})
    kit.add("mixture", Mixture(of=("plain", "bias")), heads={"classifier": nn.Linear(48, 4)})
    kit.add("half", Composition(route=Mix({"a": 0.5, "plain": 0.5})))
    kit.add("all", Composition(route=Stack("half", "own")))
    batch = ZOO["bert"].batch(2, 0)
    for name, owner in (("stack", "b"), ("own", "own"), ("mixture", "mixture"), ("all", "own")):
        with torch.no_grad(), kit.use(name):
            want = out(kit(**batch))
        kitout.combine(kit, "c", {name: 1.0})
        assert torch.equal(
            kit["c"].heads_by_path()["classifier"].weight, kit[owner].heads_by_path()["classifier"].weight
        )
        with torch.no_grad(), kit.use("c"):
            assert (out(kit(**batch)) - want).abs().max() <= 1e-5
        kit.remove("c")
    with pytest.raises(ConfigError, match=r"blends or changes a head of 'a'.*drop='heads'"):
        kitout.combine(kit, "c", {"half": 1.0})
    with pytest.raises(ConfigError, match="'own' at 1, 'a' at 1"):
        kitout.combine(kit, "c", {"own": 1.0, "a": 1.0})
    kitout.combine(kit, "c", {"half": 1.0}, drop="heads")
    assert not kit["c"].heads_by_path()


def test_the_usage_is_the_compositions_own_or_that_of_its_parts() -> None:
    kit = kit_of("gpt2", {"a": LoRA(rank=2), "b": LoRA(rank=2)}, torch.float32)
    kit.add("m", Mixture(of=("a", "b")))
    for name, task in (("a", "causal_lm"), ("b", "causal_lm"), ("m", "classification")):
        kit[name].usage = {"task": task, "labels": [], "base": {}, "images": None, "text": None}
    kit.add("both", Composition(route=Stack("a", "b")))
    kitout.combine(kit, "c", {"both": 1.0})
    assert kit["c"].usage == kit["a"].usage
    kitout.combine(kit, "d", {"m": 1.0})
    assert kit["d"].usage == kit["m"].usage
    kit["b"].usage = None
    kitout.combine(kit, "e", {"both": 1.0})
    assert kit["e"].usage is None
