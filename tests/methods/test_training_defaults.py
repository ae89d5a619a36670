"""Every method says how it is trained, a new one need not, and the parameters that LoRA+ speeds up exist."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from torch import nn

import kitout
from kitout import LoRA, PrefixTuning
from kitout.base.site import Site
from kitout.delta import Delta
from kitout.errors import KitoutError
from kitout.method import REGISTRY, Method, TrainingDefaults, registered_methods
from kitout.methods.deltas.affine import ScaleShift
from laws.cases import CASES, Case


@pytest.mark.parametrize("method", list(registered_methods()), ids=lambda m: m.__name__)
def test_every_method_has_training_defaults_of_its_own(method: type[Method]) -> None:
    defaults = method.training
    assert isinstance(defaults, TrainingDefaults)
    assert "training" in vars(method), "set `training` to say how it is trained"
    assert 0 < defaults.lr < 1
    assert 0 < defaults.head_lr < 1
    assert 0 <= defaults.weight_decay < 1


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_training_defaults_are_finite_with_any_settings(case: Case) -> None:
    defaults = case.method.training_defaults()
    assert all(math.isfinite(value) for value in (defaults.lr, defaults.weight_decay, defaults.head_lr))
    assert 0 < defaults.lr < 1


def test_a_new_method_has_the_common_defaults() -> None:
    class NewMethod(Method):
        def build(self, site: Site, shared: nn.Module | None) -> Delta:
            return ScaleShift(site.d_out)

        def num_parameters(self, sites: Sequence[Site]) -> int:
            return sum(2 * s.d_out for s in sites)

    assert NewMethod.__name__ not in REGISTRY
    assert NewMethod.training == NewMethod().training_defaults() == TrainingDefaults()


def test_training_defaults_are_not_settings() -> None:
    assert "training" not in LoRA().model_dump()
    assert "training" not in LoRA.model_json_schema()["properties"]
    with pytest.raises(KitoutError, match="training"):
        LoRA(training=1e-3)


@pytest.mark.parametrize("method", [LoRA(rank=2), LoRA(rank=2, dora=True), LoRA(rank=2, init="pissa"), PrefixTuning()])
def test_loraplus_parameters_exist(method: Method, tiny_llama: nn.Module) -> None:
    kit = kitout.attach(tiny_llama)
    adapter = kit.add("a", method, seed=0)
    for site in adapter.sites:
        delta = adapter.delta(site)
        assert [delta.get_parameter(name).shape[0] for name in delta.loraplus_parameters] == [site.d_out] * len(
            delta.loraplus_parameters
        )
        assert bool(delta.loraplus_parameters) == isinstance(method, LoRA)
