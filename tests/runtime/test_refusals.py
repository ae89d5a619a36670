"""Bad input: a specific error that names the fault, what there is and what to write; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import kitout
from kitout import IA3, SSF, BitFit, FullFineTuning, Houlsby, Kit, LoRA, PartialFineTuning, errors
from laws.activate import kit_with, put_on, run
from zoo import ZOO

LLAMA = ZOO["llama"]


@pytest.fixture
def kit(tiny_llama: nn.Module) -> Iterator[Kit]:
    """Whatever a test tries, the kit has and computes afterwards what it did before."""
    kit = kitout.attach(tiny_llama)
    put_on(kit, LoRA(rank=2), "a", seed=1)
    batch = LLAMA.batch(2, 0)
    base, state = run(kit, batch), {k: v.clone() for k, v in kit.base.state_dict().items()}
    with kit.use("a"):
        active = run(kit, batch)
    yield kit
    assert kit.names == ["a"]
    assert kit.active is None
    assert not kit.merged
    assert len(list(kit.parameters())) == len(list(kit["a"].parameters()))
    assert torch.equal(run(kit, batch), base)
    assert all(torch.equal(v, state[k]) for k, v in kit.base.state_dict().items())
    with kit.use("a"):
        assert torch.equal(run(kit, batch), active)


PLACES = {
    "unknown role": (lambda: LoRA(targets="attn.w"), ["attn.w", "attn.q (2)"]),
    "a role this model lacks": (lambda: LoRA(targets="cross.q"), ["cross.q", "attn.q (2)"]),
    "a mistyped path": (lambda: LoRA(targets="q_porj"), ["q_porj", "q_proj"]),
    "commas": (lambda: LoRA(targets="attn.q,attn.v"), ["separated by spaces", "'attn.q attn.v'"]),
    "nothing": (lambda: LoRA(targets=" "), ["empty"]),
    "a layer too far": (lambda: LoRA(layers="0,7"), ["no layer 7", "model.layers has 2", "counted from 0"]),
    "too many last layers": (lambda: LoRA(layers="last:3"), ["last:3", "model.layers has 2"]),
    "none of the last layers": (lambda: LoRA(layers="last:0"), ["last:0"]),
    "an unknown tower": (lambda: LoRA(layers="decoder/last:1"), ["decoder", "model.layers"]),
    "no layers at all": (lambda: LoRA(layers="some"), ["some", "last:4"]),
    "a head by layer": (lambda: LoRA(targets="head", layers="0"), ["head", "outside the blocks"]),
    "two faults at once": (lambda: LoRA(targets="attn.w q_porj", layers="9"), ["attn.w", "q_porj", "no layer 9"]),
    "parameters by name": (lambda: PartialFineTuning(names="*.biass"), ["*.biass", "no parameter"]),
}


@pytest.mark.parametrize(("method", "texts"), PLACES.values(), ids=PLACES.keys())
def test_places_that_do_not_exist(kit: Kit, method: Callable[[], kitout.Method], texts: list[str]) -> None:
    with pytest.raises(errors.TargetError) as error:
        kit.add("new", method())
    assert all(t in str(error.value) for t in texts), str(error.value)


SETTINGS = {
    "rank 0": (lambda: LoRA(rank=0), ["rank", "0"]),
    "negative rank by role": (lambda: LoRA(rank={"attn.*": -1}), ["rank", "-1"]),
    "dropout 1": (lambda: LoRA(dropout=1.0), ["dropout=1.0"]),
    "unknown setting": (lambda: LoRA(ranks=4), ["ranks"]),
    "unknown preset": (lambda: IA3(preset="papers"), ["papers", "paper"]),
    "dora and pissa": (lambda: LoRA(dora=True, init="pissa"), ["dora", "pissa"]),
    "two faults": (lambda: LoRA(rank=0, dropout=2.0), ["rank", "dropout=2.0", "2 errors"]),
    "width 0": (lambda: Houlsby(width=0), ["width=0"]),
    "negative spread": (lambda: SSF(std=-1.0), ["std"]),
    "partial of nothing": (lambda: PartialFineTuning(), ["last=k", "found nothing"]),
    "partial of two": (lambda: PartialFineTuning(last=1, part="head"), ["exactly one", "last=1"]),
    "last 0": (lambda: PartialFineTuning(last=0), ["last=0"]),
}


@pytest.mark.parametrize(("make", "texts"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_out_of_range(make: Callable[[], kitout.Method], texts: list[str]) -> None:
    with pytest.raises(errors.ConfigError) as error:
        make()
    assert all(t in str(error.value) for t in texts), str(error.value)


BUILT = {
    "a rank wider than a site": (lambda: LoRA(rank=25, targets="attn.v"), ["rank 25", "v_proj", "at most 24"]),
    "a rank for no role here": (lambda: LoRA(rank={"mlp.*": 4}), ["rank", "attn.q"]),
    "fine-tuning an input": (lambda: FullFineTuning(targets="in:mlp.down"), ["in:mlp.down"]),
}


@pytest.mark.parametrize(("method", "texts"), BUILT.values(), ids=BUILT.keys())
def test_settings_this_model_cannot_hold(kit: Kit, method: Callable[[], kitout.Method], texts: list[str]) -> None:
    with pytest.raises((errors.ConfigError, errors.TargetError)) as error:
        kit.add("new", method())
    assert all(t in str(error.value) for t in texts), str(error.value)


@pytest.mark.parametrize(
    "name", ["", "..", ".", "../a", "a/b", "a\\b", "/a", ".a", "-a", "a b", "a\n", "é", "a" * 129, None, 3, "a\0"]
)
def test_unsafe_names(kit: Kit, name: str) -> None:
    with pytest.raises(errors.InvalidAdapterName) as error:
        kit.add(name, LoRA())
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["b", "B.2", "a.b.c", "x_-9", "a" * 128])
def test_safe_names(kit: Kit, name: str) -> None:
    kit.add(name, LoRA(rank=2), seed=0)
    with kit.use(name):
        run(kit, LLAMA.batch(2, 0))
    kit.remove(name)


def test_a_name_taken(kit: Kit) -> None:
    before = list(kit["a"].parameters())
    with pytest.raises(errors.AdapterExists, match="'a'"):
        kit.add("a", IA3())
    assert all(p is q for p, q in zip(before, kit["a"].parameters(), strict=True))


def test_a_method_class_is_not_a_method(kit: Kit) -> None:
    with pytest.raises((errors.KitoutError, TypeError)) as error:
        kit.add("new", LoRA)  # type: ignore[arg-type]
    assert "LoRA" in str(error.value)


@pytest.mark.parametrize("ask", ["remove", "num_parameters", "merge", "merged_copy", "train_only", "__getitem__"])
def test_names_nobody_has(kit: Kit, ask: str) -> None:
    with pytest.raises(errors.UnknownAdapter) as error:
        getattr(kit, ask)("aa")
    assert "did you mean 'a'" in str(error.value) or "known: 'a'" in str(error.value)


def test_merging_is_one_state(kit: Kit) -> None:
    kit.add("b", IA3())
    kit.merge("a")
    for forbidden in (
        lambda: kit.merge("b"),
        lambda: kit.use("b"),
        lambda: kit.use(None),
        lambda: kit.add("c", LoRA()),
        lambda: kit.remove("a"),
    ):
        with pytest.raises(errors.MergeStateError) as error:
            forbidden()
        assert "'a' is merged" in str(error.value)
        assert "unmerge()" in str(error.value)
    kit.unmerge()
    with pytest.raises(errors.MergeStateError, match="nothing is merged"):
        kit.unmerge()
    with pytest.raises(errors.MergeStateError, match="no adapter"):
        kit.merge()
    kit.remove("b")


def test_merging_while_active_counts_once(kit: Kit) -> None:
    batch = LLAMA.batch(2, 0)
    with kit.use("a"):
        active = run(kit, batch)
        kit.merge("a")
        merged = run(kit, batch)
        assert (merged - active).abs().max() <= 1e-5
        assert kit.active is None
        kit.unmerge()
        assert torch.equal(run(kit, batch), active)


def test_training_while_merged_reaches_no_adapter(kit: Kit) -> None:
    """A merged adapter is in the weights: a loss cannot be run backward to it, and says so at once."""
    kit.merge("a")
    loss = kit(**LLAMA.batch(2, 0)).logits.mean()
    assert not loss.requires_grad
    kit.unmerge()


def test_a_merge_that_fails_half_way_changes_nothing(kit: Kit) -> None:
    kit.add("b", BitFit(targets="norm attn.q"))
    with torch.no_grad():
        for p in kit["b"].parameters():
            p.add_(1.0)
    with pytest.raises(errors.NotMergeable) as error:
        kit.merge("a", "b")
    assert "norm" in str(error.value)
    assert "shift" in str(error.value)
    with pytest.raises(errors.NotMergeable):
        kit.merged_copy("b")
    kit.remove("b")


def test_attach_twice(kit: Kit) -> None:
    with pytest.raises(errors.AlreadyAttached, match="kit"):
        kitout.attach(kit.base)
    with pytest.raises(errors.AlreadyAttached, match="the model itself"):
        kitout.attach(kit)


def test_attach_to_a_part_or_a_whole_that_is_attached(kit: Kit) -> None:
    with pytest.raises(errors.AlreadyAttached):
        kitout.attach(kit.base.model)
    outer = nn.ModuleDict({"inner": kit.base})
    with pytest.raises(errors.AlreadyAttached):
        kitout.attach(outer)


@pytest.mark.parametrize("thing", [None, "meta-llama/Llama-3", 3, {}, nn.Linear])
def test_attach_to_what_is_no_model(thing: object) -> None:
    with pytest.raises(errors.KitoutError, match=r"nn\.Module"):
        kitout.attach(thing)  # type: ignore[arg-type]


def test_attach_to_a_model_without_blocks_says_what_to_write() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(errors.NoBlocksFound) as error:
        kitout.attach(model)
    for texts in ("[3 -> 4]", "[4 -> 5]", "roles=", "attn.qkv"):
        assert texts in str(error.value)
    assert [p.requires_grad for p in model.parameters()] == grads
    assert type(model) is nn.Sequential


def test_roles_that_match_nothing_or_are_none(tiny_llama: nn.Module) -> None:
    with pytest.raises(errors.TargetError) as error:
        kitout.attach(tiny_llama, roles={r"nothing$": "attn.q", r"q_proj$": "attn.queue", "(": "attn.q"})
    for texts in ("nothing$", "attn.queue", "did you mean", "not a regular expression"):
        assert texts in str(error.value)
    assert all(p.requires_grad for p in tiny_llama.parameters())


def test_a_given_example_that_fails_is_the_callers_error(tiny_llama: nn.Module) -> None:
    with pytest.raises((TypeError, ValueError)):
        kitout.attach(tiny_llama, example_batch={"pixels": torch.zeros(1)})
    assert "_kitout" not in vars(tiny_llama)
    assert all(p.requires_grad for p in tiny_llama.parameters())
    kitout.attach(tiny_llama)


def test_an_error_is_also_the_python_error_one_would_expect() -> None:
    for error, kind in (
        (errors.TargetError, ValueError),
        (errors.ConfigError, ValueError),
        (errors.UnknownAdapter, KeyError),
        (errors.MergeStateError, RuntimeError),
        (errors.FileError, ValueError),
    ):
        assert issubclass(error, errors.KitoutError)
        assert issubclass(error, kind)
    assert str(errors.UnknownAdapter("plain words")) == "plain words"


def test_a_detached_kit_refuses_everything() -> None:
    kit, _ = kit_with("llama", a=LoRA())
    kit.use("a")
    kit.detach()
    for action in (lambda: kit.use("a"), lambda: kit.add("b", LoRA()), lambda: kit.merge("a")):
        with pytest.raises(errors.KitDetached):
            action()


def test_a_seed_is_a_number(kit: Kit) -> None:
    with pytest.raises(errors.ConfigError, match="seed"):
        kit.add("b", LoRA(), seed="x")  # type: ignore[arg-type]
