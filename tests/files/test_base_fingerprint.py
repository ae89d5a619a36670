"""The fingerprint: the same for copies of one base in other precisions, another for everything else, and cheap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kitout
from kitout import LoRA
from kitout.errors import WrongBase
from kitout.files.base_fingerprint import SAMPLES, differences, fingerprint
from laws.activate import fresh_kit
from zoo import ZOO, Specimen, randomize_model


def fingerprint_of(base: nn.Module) -> kitout.files.base_fingerprint.Fingerprint:
    return fingerprint(kitout.attach(base).state, [])


def test_copies_in_other_precisions_are_the_same_base(specimen: Specimen) -> None:
    kits = [fresh_kit(specimen) for _ in range(6)]
    half, brain = torch.half, torch.bfloat16
    for kit, dtypes in zip(
        kits, ((), (torch.double,), (brain,), (half,), (half, brain), (brain, torch.float)), strict=True
    ):
        for dtype in dtypes:
            kit.base.to(dtype)
    prints = [fingerprint(kit.state, []) for kit in kits]
    for one in prints:
        for other in prints:
            assert differences(one, other) == []


def test_another_seed_is_another_base(specimen: Specimen) -> None:
    messages = differences(fingerprint_of(specimen.build()), fingerprint_of(randomize_model(specimen.build(), seed=1)))
    assert len(messages) == 1
    assert messages[0].startswith("values: ")


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_a_light_fine_tune_is_another_base(size: float) -> None:
    """As one step of Adam moves every weight; here by a hundredth to a ten-thousandth of their spread."""
    tuned = ZOO["llama"].build()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(size * p.std() * torch.randn_like(p).sign())
    found = fingerprint_of(tuned)
    assert differences(fingerprint_of(ZOO["llama"].build()), found)
    assert differences(fingerprint_of(ZOO["llama"].build().bfloat16()), found)


def test_shapes_and_keys_are_reported(specimen: Specimen) -> None:
    whole = fingerprint_of(specimen.build())
    key, *_ = whole.tensors
    less = {k: v for k, v in whole.tensors.items() if k != key}
    grown = whole.tensors | {key: whole.tensors[key].model_copy(update={"shape": [1, 2, 3]})}
    lacking, wider = (whole.model_copy(update={"tensors": t}) for t in (less, grown))
    assert differences(whole, lacking) == [f"keys: this base lacks {key}"]
    assert differences(lacking, whole) == [f"keys: this base also has {key}"]
    assert differences(whole, wider)[0].startswith(f"shapes: {key} was ")


def test_heads_are_left_out_unless_adapted() -> None:
    kit = kitout.attach(ZOO["llama"].build())
    assert "lm_head.weight" not in fingerprint(kit.state, []).tensors
    assert "lm_head.weight" in fingerprint(kit.state, ["lm_head"]).tensors
    assert fingerprint(kit.state, [], ["model.norm"]).left_out == ["lm_head", "model.norm"]


@pytest.mark.parametrize("inference", [False, True])
def test_a_change_of_the_base_shows_at_once(inference: bool) -> None:
    with torch.inference_mode(inference):  # whose tensors count no writes
        base = ZOO["llama"].build()
    kit = kitout.attach(base)
    before = fingerprint(kit.state, [])
    assert fingerprint(kit.state, []) == before
    weight = base.model.layers[0].mlp.up_proj.weight
    with torch.inference_mode(inference), torch.no_grad():
        weight.mul_(1.5)
    assert differences(before, fingerprint(kit.state, []))
    with torch.inference_mode(inference), torch.no_grad():
        weight.div_(1.5)
    assert differences(before, fingerprint(kit.state, [])) == []
    base.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.detach() * 2)
    assert differences(before, fingerprint(kit.state, []))


def test_while_merged_it_is_that_of_the_unmerged_base() -> None:
    before = fingerprint_of(ZOO["bert"].build())
    kit = kitout.attach(ZOO["bert"].build())
    for name in ("early", "late"):
        kit.add(name, LoRA(targets="all-linear"), heads={"bert.pooler": nn.Linear(48, 48)})
        with torch.no_grad():
            for p in kit[name].parameters():
                p.add_(1.0)
        kit.merge(name)
        assert differences(before, fingerprint(kit.state, [])) == []  # read while merged, and what was read before
        kit.unmerge()
        assert differences(before, fingerprint(kit.state, [])) == []


def test_class_names_do_not_count() -> None:
    base = ZOO["llama"].build()
    renamed = type("Other", (type(base),), {})
    base.__class__ = renamed
    assert differences(fingerprint_of(ZOO["llama"].build()), fingerprint_of(base)) == []


def test_without_values_shapes_are_compared_with_a_warning(tmp_path: Path) -> None:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", LoRA())
    kit.save("a", tmp_path / "a")
    hollow = ZOO["llama"].build().to("meta")
    empty = kitout.attach(hollow)
    assert not fingerprint(empty.state, []).valued
    assert differences(fingerprint(kit.state, []), fingerprint(empty.state, [])) == []
    with pytest.warns(UserWarning, match="shapes only"):
        empty.load(tmp_path / "a")
    other = kitout.attach(ZOO["qwen3"].build().to("meta"))
    with pytest.warns(UserWarning, match="shapes only"), pytest.raises(WrongBase, match="keys"):
        other.load(tmp_path / "a")


class CountWork(TorchDispatchMode):
    """Counts operations, and the values that each of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.values, self.most = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        made = result.numel() if isinstance(result, torch.Tensor) and not func.is_view else 0
        self.operations, self.values, self.most = self.operations + 1, self.values + made, max(self.most, made)
        return result


def test_it_is_cheap() -> None:
    """A base of 300 tensors, the number that 135M-parameter models have: a few values of each, read once."""
    kit = kitout.attach(ZOO["llama"].build())
    many = nn.ModuleList(nn.Linear(64, 64) for _ in range(150))
    kit.base.register_module("many", many)
    tensors = len(kit.base.state_dict())
    with CountWork() as first:
        fingerprint(kit.state, [])
    assert tensors < first.operations < 6 * tensors
    assert first.values <= 6 * SAMPLES * tensors
    assert first.most <= SAMPLES * tensors  # all that was sampled, in one piece
    with CountWork() as again:
        fingerprint(kit.state, [])
    assert again.operations == 0
