"""Copies and classes: a kit and a dressed model deepcopy and pickle, classes keep their names, others stack on ours."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, FullFineTuning, Kit, LoRA
from laws.activate import kit_with, put_on, run
from zoo import ZOO, Specimen, out

WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@pytest.fixture
def kit(specimen: Specimen) -> Kit:
    kit = kitout.attach(specimen.build())
    put_on(kit, LoRA(rank=2, targets="all-linear"), "a", seed=1)
    put_on(kit, IA3(), "b", seed=2)
    return kit


@ways
def test_a_kit_travels_whole(kit: Kit, specimen: Specimen, way: Any) -> None:
    batch = specimen.batch(2, 0)
    rows = ["a", "b"]
    with kit.use(rows):
        want = run(kit, batch)
    base = run(kit, batch)
    kit.use("b")
    other = way(kit)
    assert other.names == kit.names
    assert other.base is not kit.base
    assert other.active == "b"
    with other.use(None):
        assert torch.equal(run(other, batch), base)
    with other.use(rows):
        assert torch.equal(run(other, batch), want)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    with kit.use(rows):
        assert torch.equal(run(kit, batch), want), "the copy shares values with the original"
    put_on(other, LoRA(rank=2), "c")
    assert "c" not in kit
    other.use(None)
    plain = other.detach()
    assert torch.equal(run(plain, batch), base)
    with kit.use(rows):
        assert torch.equal(run(kit, batch), want), "detaching the copy undressed the original"


@ways
def test_a_bare_attached_model_travels(kit: Kit, specimen: Specimen, way: Any) -> None:
    batch = specimen.batch(2, 0)
    with kit.use("a"):
        want = run(kit.base, batch)
        other = way(kit.base)
    assert list(other.state_dict()) == list(kit.base.state_dict())
    kit.use("a")
    again = way(kit.base)
    assert torch.equal(run(again, batch), want)


def test_a_single_module_travels(kit: Kit) -> None:
    """A tool that copies one block must get a block, not the whole kit."""
    block = kit.base.get_submodule(kit.survey.blocks[0].path)
    other = copy.deepcopy(block)
    assert type(other).__name__ == type(block).__name__
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in block.named_parameters()]


def test_classes_keep_their_names_and_kin(specimen: Specimen) -> None:
    before = {n: type(m) for n, m in specimen.build().named_modules()}
    kit = kitout.attach(specimen.build())
    put_on(kit, LoRA(rank=2, targets="all-linear"), "a")
    for name, module in kit.base.named_modules():
        old, new = before[name], type(module)
        assert isinstance(module, old)
        assert (new.__name__, new.__qualname__, new.__module__) == (old.__name__, old.__qualname__, old.__module__)
        assert new.__doc__ == old.__doc__
    assert repr(kit.base) == repr(specimen.build())


def test_two_models_of_a_class_do_not_share_their_route(specimen: Specimen) -> None:
    batch = specimen.batch(2, 0)
    one, two = kitout.attach(specimen.build()), kitout.attach(specimen.build())
    put_on(one, LoRA(rank=2), "a")
    bare = specimen.build()
    base = run(bare, batch)
    one.use("a")
    assert torch.equal(run(two, batch), base)
    assert torch.equal(run(bare, batch), base)
    one.detach()
    put_on(two, LoRA(rank=2), "a")
    with two.use("a"):
        assert not torch.equal(run(two, batch), base)


class Counting:
    """What another library stacks on a module's class, as FSDP2 does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def stacked_on(module: nn.Module) -> None:
    """A dynamic subclass over whatever the class is now."""
    cls = type(module)
    module.__class__ = type(f"FSDP{cls.__name__}", (Counting, cls), {})


def test_detach_leaves_classes_that_others_stacked_on_ours() -> None:
    specimen = ZOO["llama"]
    batch, base = specimen.batch(2, 0), run(specimen.build(), specimen.batch(2, 0))
    kit = kitout.attach(specimen.build())
    put_on(kit, LoRA(rank=2), "a")
    chosen = [kit.base.model.layers[0], kit.base.model.layers[1].self_attn.q_proj, kit.base]
    for module in chosen:
        stacked_on(module)
    with kit.use("a"):
        assert not torch.equal(run(kit, batch), base)
    assert torch.equal(run(kit, batch), base)
    model = kit.detach()
    for module in chosen:
        assert type(module).__name__.startswith("FSDP")
        assert not any("kitout" in key for cls in type(module).__mro__ for key in vars(cls))
        assert not any("kitout" in key for key in vars(module))
        module.__dict__["calls"] = 0
    assert torch.equal(run(model, batch), base)
    assert all(module.__dict__["calls"] == 1 for module in chosen), "the other class no longer runs"


def test_hooks_of_others_see_active_adapters() -> None:
    specimen = ZOO["llama"]
    kit, batch = kitout.attach(specimen.build()), specimen.batch(2, 0)
    put_on(kit, LoRA(rank=2), "a")
    seen: list[Tensor] = []
    handle = kit.base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, y: seen.append(y))
    run(kit, batch)
    with kit.use("a"):
        run(kit, batch)
    handle.remove()
    assert not torch.equal(*seen)


def test_a_kit_copies_after_a_forward_of_full_fine_tuning() -> None:
    kit, batch = kit_with("llama", f=FullFineTuning())
    with kit.use("f"):
        out(kit(**batch)).sum().backward()
    assert torch.equal(run(copy.deepcopy(kit), batch), run(kit, batch))


def test_another_model_of_the_swapped_class() -> None:
    kit, batch = kit_with("llama", a=LoRA())
    other = type(kit.base)(kit.config).eval()
    assert torch.isfinite(out(other(**batch))).all()
