"""Combined adapters equal the arithmetic of what their parts change, in every form a result can have."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import kitout
from fuse.parts import add, change, distance, kit_of
from kitout import IA3, SSF, BitFit, Composition, FullFineTuning, Houlsby, Kit, LoRA, Mixture, PrefixTuning
from kitout.files.usage_record import BaseRecord, TextRecord, UsageRecord
from kitout.fuse.result import common_usage
from zoo import ZOO, out

METHODS = {
    "lora": LoRA(rank=3, alpha=5),
    "rs": LoRA(rank=4, rslora=True, targets="all-linear"),
    "dora": LoRA(rank=3, dora=True),
    "pissa": LoRA(rank=2, init="pissa"),
    "in": LoRA(rank=2, targets="in:mlp.down attn.q"),
    "both": LoRA(rank=2, targets="in:mlp.down mlp.down"),
    "bias": LoRA(rank=2, bias="all"),
    "table": LoRA(rank=2, targets="embed attn.q"),
    "ia3": IA3(),
    "full": FullFineTuning(targets="attn.o norm"),
    "bitfit": BitFit(),
    "ssf": SSF(),
}
PLAIN = ("lora", "rs", "pissa", "in", "both", "bias", "table")  # sums of products


@pytest.fixture(scope="module")
def kit() -> Kit:
    return kit_of("gpt2", METHODS)


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "kit" in request.fixturenames and "c" in request.getfixturevalue("kit"):
        request.getfixturevalue("kit").remove("c")


@pytest.mark.parametrize("pair", list(itertools.combinations(METHODS, 2)), ids="-".join)
def test_a_sum_is_the_sum(kit: Kit, pair: tuple[str, str]) -> None:
    weights = {pair[0]: 1.0, pair[1]: -0.5}
    fused = kitout.combine(kit, "c", weights)
    is_lora = all(name in PLAIN for name in pair)
    assert type(kit["c"].method) is (LoRA if is_lora else FullFineTuning)
    assert distance(change(kit, {"c": 1}), change(kit, weights)) <= 1e-9
    assert fused.residual.total <= 1e-9
    assert kit["c"] is fused.adapter


@pytest.mark.parametrize("name", METHODS)
def test_one_adapter_alone_is_that_adapter(kit: Kit, name: str) -> None:
    other = "rs" if name == "lora" else "lora"
    batch = ZOO["gpt2"].batch(2, 0)
    with torch.no_grad(), kit.use(name):
        expected = out(kit(**batch))
    for weights in ({name: 1.0}, {name: 1.0, other: 0.0}):
        kitout.combine(kit, "c", weights)
        with torch.no_grad(), kit.use("c"):
            found = out(kit(**batch))
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
        kit.remove("c")


@pytest.mark.parametrize("name", ["rs", "dora", "ia3"])
def test_one_adapter_alone_in_fp32(name: str) -> None:
    kit = kit_of("llama", {name: METHODS[name]}, torch.float32)
    batch = ZOO["llama"].batch(2, 0)
    kitout.combine(kit, "c", {name: 1.0})
    values = []
    for route in (name, "c"):
        with torch.no_grad(), kit.use(route):
            values.append(out(kit(**batch)))
    assert (values[0] - values[1]).norm() <= 1e-6 * values[0].norm()


@pytest.mark.parametrize("name", ["rs", "dora", "both"])
@pytest.mark.parametrize(
    "to", ["exact", "dense", LoRA(rank=2), LoRA(energy=0.9)], ids=["exact", "dense", "rank", "energy"]
)
def test_an_adapter_less_itself_is_the_base(kit: Kit, name: str, to: str | LoRA) -> None:
    add(kit, "twin", METHODS[name])
    with torch.no_grad():
        for mine, theirs in zip(kit["twin"].parameters(), kit[name].parameters(), strict=True):
            mine.copy_(theirs)
    fused = kitout.combine(kit, "c", {name: 1.0, "twin": -1.0}, to=to)
    batch = ZOO["gpt2"].batch(2, 0)
    with torch.no_grad():
        base = out(kit(**batch))
        with kit.use("c"):
            found = out(kit(**batch))
    kit.remove("twin")
    assert (found - base).abs().max() <= 1e-9
    assert fused.residual.total == 0.0


@pytest.mark.parametrize("pair", [("rs", "lora"), ("dora", "in"), ("ia3", "full"), ("bitfit", "table")], ids="-".join)
@pytest.mark.parametrize(
    "to", [LoRA(rank=3, alpha=7), LoRA(energy=0.8), LoRA(rank=2, rslora=True)], ids=["alpha", "energy", "rs"]
)
def test_the_reported_residual_is_the_measured_one(kit: Kit, pair: tuple[str, str], to: LoRA) -> None:
    weights = {pair[0]: 0.7, pair[1]: 0.4}
    fused = kitout.combine(kit, "c", weights, to=to, drop="biases norms other")
    expected, found = change(kit, weights), change(kit, {"c": 1})
    assert abs(fused.residual.total - distance(found, expected)) <= 1e-5
    assert 0 < fused.residual.total < 1
    for path, residual in fused.residual.by_site.items():
        at_site = {k: v for k, v in expected.items() if k.rpartition(".")[0] == path}
        assert abs(residual - distance({k: found[k] for k in at_site if k in found}, at_site)) <= 1e-5
    assert fused.dropped.keys() == {k for k, v in expected.items() if k not in found and float(v.square().sum()) > 0}


def test_energy_keeps_the_share_at_every_site(kit: Kit) -> None:
    fused = kitout.combine(kit, "c", {"rs": 1.0, "ia3": 1.0}, to=LoRA(energy=0.9), drop="biases")
    cut = [v for k, v in fused.residual.by_site.items() if not any(name.startswith(k) for name in fused.dropped)]
    assert cut
    assert max(cut) <= 0.1**0.5
    assert kit["c"].method.energy is None


def test_the_order_of_adapters_and_their_strength(kit: Kit) -> None:
    kit.strength("lora", 0.5)
    kitout.combine(kit, "c", {"lora": 2.0, "dora": 1.0})
    found = change(kit, {"c": 1})
    kit.strength("lora", 1.0)
    assert distance(found, change(kit, {"lora": 1.0, "dora": 1.0})) <= 1e-9


def test_a_lora_that_trains_biases_can_hold_them(kit: Kit) -> None:
    weights = {"ia3": 1.0, "lora": 1.0}
    with pytest.raises(ValueError, match="lora_bias=True"):
        kitout.combine(kit, "c", weights, to=LoRA(rank=48))
    fused = kitout.combine(kit, "c", weights, to=LoRA(rank=48, lora_bias=True))
    assert fused.residual.total <= 1e-7
    assert distance(change(kit, {"c": 1}), change(kit, weights)) <= 1e-7


@pytest.mark.parametrize("how", ["mean", "slerp", "stock"])
def test_products_and_dense_matrices_give_the_same(kit: Kit, how: str) -> None:
    weights = {"lora": 1.0, "rs": 1.0}
    kitout.combine(kit, "c", weights, how=how, lam=0.5)
    assert type(kit["c"].method) is LoRA
    found = change(kit, {"c": 1})
    kitout.combine(kit, "dense", weights, how=how, lam=0.5, to="dense")
    dense = change(kit, {"dense": 1})
    kit.remove("dense")
    assert distance(found, dense) <= 1e-9


def test_draws_depend_on_seed_adapter_and_path_alone(kit: Kit) -> None:
    options = {"how": "dare", "density": 0.5}
    changes = []
    for weights in ({"lora": 1.0}, {"rs": 0.5, "lora": 1.0}, {"lora": 1.0, "rs": 0.5}):
        torch.manual_seed(len(changes))
        kitout.combine(kit, "c", weights, **options)
        changes.append(change(kit, {"c": 1}))
        kit.remove("c")
    kitout.combine(kit, "c", {"rs": 0.5}, **options)
    alone = change(kit, {"c": 1})
    kit.remove("c")
    summed = {k: changes[0].get(k, 0) + alone.get(k, 0) for k in {**changes[0], **alone}}
    assert distance(changes[1], summed) <= 1e-9
    assert distance(changes[1], changes[2]) <= 1e-12
    kitout.combine(kit, "c", {"lora": 1.0}, seed=1, **options)
    assert distance(change(kit, {"c": 1}), changes[0]) > 0.1


def test_a_fused_adapter_travels(kit: Kit, tmp_path: Path) -> None:
    for number, to in enumerate(("exact", "dense", LoRA(rank=2))):
        kitout.combine(kit, "c", {"lora": 1.0, "in": 0.5}, to=to)
        kit.save("c", tmp_path / str(number))
        again = kit.load(tmp_path / str(number), name="again")
        assert all(torch.equal(a, b) for a, b in zip(kit["c"].parameters(), again.parameters(), strict=True))
        assert again.metadata["fused"]["weights"] == {"lora": 1.0, "in": 0.5}
        kit.remove("again")
        kit.remove("c")


def test_how_parameters_averages_what_does_not_fold() -> None:
    kit = kit_of("llama", {"a": PrefixTuning(length=3), "b": PrefixTuning(length=3), "h": Houlsby()})
    add(kit, "g", Houlsby())
    for pair in (("a", "b"), ("h", "g")):
        kitout.combine(kit, "c", {pair[0]: 3.0, pair[1]: 1.0}, how="parameters")
        triples = zip(*(kit[name].parameters() for name in (*pair, "c")), strict=True)
        for first, second, mean in triples:
            assert torch.allclose(mean, 0.75 * first + 0.25 * second, rtol=0, atol=1e-12)
        kit.remove("c")
    add(kit, "longer", PrefixTuning(length=4))
    with pytest.raises(ValueError, match="length=3 and 4"):
        kitout.combine(kit, "c", {"a": 1.0, "longer": 1.0}, how="parameters")
    for name in ("m", "n"):  # whose parts do not fold
        add(kit, name, Mixture(of=("h", "g")))
    kitout.combine(kit, "c", {"m": 1.0, "n": 1.0}, how="parameters")
    kit.add("route", Composition(route="a"))
    with pytest.raises(ValueError, match="'route': a route has no parameters"):
        kitout.combine(kit, "d", {"a": 1.0, "route": 1.0}, how="parameters")


def test_the_head_of_one_source_goes_along() -> None:
    kit = kit_of("bert", {"plain": LoRA(rank=2)}, torch.float32)
    for name in ("a", "b"):
        kit.add(name, LoRA(rank=2), heads={"classifier": nn.Linear(48, 3)}, seed=0)
    kitout.combine(kit, "c", {"a": 1.0, "plain": 0.5})
    assert torch.equal(kit["c"].heads_by_path()["classifier"].weight, kit["a"].heads_by_path()["classifier"].weight)
    with pytest.raises(ValueError, match="drop='heads'"):
        kitout.combine(kit, "d", {"a": 1.0, "b": 1.0})
    kitout.combine(kit, "d", {"a": 1.0, "b": 1.0}, drop="heads")
    assert not kit["d"].heads_by_path()


def test_the_usage_is_what_the_sources_share() -> None:
    base = BaseRecord(name="org/model", source="hub")
    text = TextRecord(
        tokenizer="t",
        max_length=64,
        system_prompt="Be kind.",
        answers=["a", "b"],
        answer_tokens=[[1], [2]],
        end_token=3,
    )
    one = UsageRecord(task="causal_lm", base=base, text=text).model_dump()
    other = copy.deepcopy(one) | {"text": one["text"] | {"answers": ["c", "b"], "max_length": 128}}
    assert common_usage([one, copy.deepcopy(one)]) == one
    shared = UsageRecord.model_validate(common_usage([one, other]))
    assert shared.text is not None
    assert (shared.text.answers, shared.text.answer_tokens, shared.text.end_token) == ([], [], None)
    assert (shared.text.system_prompt, shared.text.max_length) == ("Be kind.", 128)
    assert common_usage([one, None]) is None
    assert common_usage([one, one | {"task": "classification"}]) is None
    assert common_usage([]) is None
