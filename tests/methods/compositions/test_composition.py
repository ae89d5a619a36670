"""A route under a name computes what the route computes, is one adapter in every call, and travels with its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kitout
from kitout import IA3, Composition, LoRA, Mix, Only, PrefixTuning, Stack
from kitout.errors import AdapterExists, ConfigError, FileError, KitoutError, RouteError
from laws.activate import assert_same, fresh_kit, kit_with, put_on, run
from zoo import ZOO

ROUTE = Stack("a", Mix({"b": 0.5}), "p")


def test_its_name_is_its_route() -> None:
    kit, batch = kit_with("llama", a=LoRA(rank=2), b=IA3(), p=PrefixTuning(length=3))
    kit.add("both", Composition(route=ROUTE))
    assert not any(p.requires_grad for p in kit.parameters())
    for named, spelled in ((("both"), ROUTE), (["both", None], [ROUTE, None]), (Mix({"both": 0.3}), Mix({ROUTE: 0.3}))):
        with kit.use(named):
            value = run(kit, batch)
        with kit.use(spelled):
            assert torch.equal(value, run(kit, batch))
    kit.strength("a", 0.4)  # a part's strength counts, also when it changes while the composition is active
    kit.use("both")
    value = run(kit, batch)
    kit.strength("a", 1.0)
    assert not torch.equal(run(kit, batch), value)
    kit.strength("both", 0.3)
    with kit.use("both"):
        value = run(kit, batch)
    with kit.use(Mix({ROUTE: 0.3})):
        assert torch.equal(value, run(kit, batch))


def test_a_composition_of_compositions_merges_as_its_route() -> None:
    kit, batch = kit_with("gpt2", a=LoRA(rank=2), b=IA3())
    kit.add("both", Composition(route=Stack("a", Mix({"b": 0.5}))))
    kit.add("deep", Composition(route=Mix({"both": 0.7, "a": -0.2})))
    with kit.use("deep"):
        want = run(kit, batch)
    kit.merge("deep")
    assert_same(run(kit, batch), want)
    with pytest.raises(RouteError, match="its part 'a' is merged"):
        kit.add("more", Composition(route="a"))
    kit.unmerge()
    assert_same(run(kit.merged_copy("deep"), batch), want)


def test_what_has_no_meaning_is_refused() -> None:
    kit, _ = kit_with("llama", a=LoRA(rank=2))
    kit.add("both", Composition(route="a"))
    with pytest.raises(RouteError, match=r"'x' cannot be a part of itself[\s\S]*'c' is no adapter"):
        kit.add("x", Composition(route=Stack("x", "c")))
    with pytest.raises(RouteError, match="'a' is a part of 'both'"):
        kit.remove("a")
    for settings in (
        {"route": Stack(None)},
        {"route": 3},
        {"route": {"stack": []}},
        {"route": "a", "targets": "attn.q"},
    ):
        with pytest.raises(ConfigError):
            Composition(**settings)
    with pytest.raises(RouteError, match="names no adapter"):
        kit.add("none", Composition())
    kit.remove("both")
    kit.remove("a")


def test_its_folder_has_every_part_once(tmp_path: Path) -> None:
    kit, batch = kit_with("llama", a=LoRA(rank=2), b=IA3(), p=PrefixTuning(length=3, encoder=4))
    kit.add("both", Composition(route=ROUTE))
    kit.add("deep", Composition(route=Stack("both", "a")))
    with kit.use("deep"):
        want = run(kit, batch)
    for _ in range(2):  # replaced in place
        kit.save("deep", tmp_path / "deep")
    assert sorted(path.name for path in (tmp_path / "deep" / "parts").iterdir()) == ["a", "b", "both", "p"]
    again = kit.load(tmp_path / "deep", name="again")  # reuses the parts, whose encoder the file does not have
    assert again.method == kit["deep"].method
    assert kit.names == ["a", "b", "p", "both", "deep", "again"]
    other = fresh_kit(ZOO["llama"])
    other.load(tmp_path / "deep")
    for each, name in ((kit, "again"), (other, "deep")):
        with each.use(name):
            assert torch.equal(run(each, batch), want)
    beside = fresh_kit(ZOO["llama"])
    beside.load(tmp_path / "deep" / "parts" / "both")  # a part that has parts finds them beside it
    assert sorted(beside.names) == ["a", "b", "both", "p"]


def test_another_part_of_that_name_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    kit, _ = kit_with("llama", b=LoRA(rank=2), a=IA3())
    kit.add("both", Composition(route=Stack("b", "a")))
    kit.save("both", tmp_path / "both")
    other = fresh_kit(ZOO["llama"])
    put_on(other, IA3(), "a", seed=5)
    with pytest.raises(AdapterExists, match="another adapter of that name"):
        other.load(tmp_path / "both")
    assert other.names == ["a"]
    other.remove("a")
    kit.strength("b", 0.5)
    kit.save("b", tmp_path / "both" / "parts" / "b")
    with pytest.raises(FileError, match="exchanged or edited"):
        other.load(tmp_path / "both")
    assert other.names == []
    kit.load(tmp_path / "both" / "parts" / "b", name="c")
    (tmp_path / "both" / "parts" / "b" / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match=r"notes\.txt"):
        kit.save("both", tmp_path / "both")
    for file in (tmp_path / "both" / "parts" / "b").iterdir():
        file.unlink()
    with pytest.raises(KitoutError, match="its part 'b' is missing"):
        other.load(tmp_path / "both")


def test_a_route_that_cannot_be_used_is_refused_when_it_is_named() -> None:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", LoRA())
    with pytest.raises(RouteError, match="no layer 7"):
        kit.add("late", Composition(route=Only("a", layers="7")))
    assert kit.names == ["a"]
