"""Law 5: save and load are bitwise, for every case; the file holds no base weights; a wrong base is refused.

That damaged and hostile folders are refused is tested with the files themselves.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import kitout
from kitout import Kit
from kitout.errors import WrongBase
from laws.activate import activated, fresh_model, kit_of, run
from laws.cases import CASES, CELLS, Case, name_of
from zoo import Specimen, randomize_model

cells = pytest.mark.parametrize(("specimen", "case"), CELLS, ids=name_of)


@cells
def test_what_is_loaded_is_what_was_saved(specimen: Specimen, case: Case, tmp_path: Path) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    with activated(kit, case) as adapter:
        strength = 0.5 if case.strengths else 1.0
        kit.strength(case.name, strength)
        want = run(kit, batch)
        kit.save(case.name, tmp_path / "a")
        loaded = kit.load(tmp_path / "a", name="again")
        kit.strength("again", strength)
        assert loaded.method == adapter.method.inference_form()
        if loaded.method == adapter.method:
            assert_equal_tensors(loaded, adapter)
        with kit.use("again"):
            assert torch.equal(run(kit, batch), want)
        assert values_in(tmp_path / "a") <= sum(p.numel() for p in adapter.state_dict().values())


def test_another_base_is_refused(specimen: Specimen, tmp_path: Path) -> None:
    kit = kit_of(specimen)
    other: Kit = kitout.attach(randomize_model(fresh_model(specimen), seed=12345))
    with activated(kit, CASES[0]):
        kit.save(CASES[0].name, tmp_path / "a")
    with pytest.raises(WrongBase):
        other.load(tmp_path / "a")
    assert other.names == []


def assert_equal_tensors(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value, theirs[key]), key


def tensors_in(folder: Path) -> str:
    (file,) = folder.glob("*.safetensors")
    return file.name


def values_in(folder: Path) -> int:
    with safe_open(folder / tensors_in(folder), "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 - a file, not a dict
