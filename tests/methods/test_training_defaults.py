"""Every method says how it is trained, and a new one need not; what may learn faster is there to be trained."""

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
from laws.cases import CASES


@pytest.mark.parametrize("method", list(registered_methods()), ids=lambda m: m.__name__)
def test_every_method_has_a_rate_of_its_own(method: type[Method]) -> None:
    rate = method.training
    assert isinstance(rate, TrainingDefaults)
    assert "rate" in vars(method), "say how it is trained"
    assert 0 < rate.lr < 1
    assert 0 < rate.head_lr < 1
    assert 0 <= rate.weight_decay < 1


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_settings_change_the_rate_to_another_finite_one(case: object) -> None:
    advised = case.method.advised()
    assert all(math.isfinite(value) for value in (advised.lr, advised.decay, advised.head))
    assert 0 < advised.lr < 1


def test_a_new_method_has_the_common_rate() -> None:
    class Fresh(Method):
        def build(self, site: Site, shared: nn.Module | None) -> Delta:
            return ScaleShift(site.d_out)

        def count(self, sites: Sequence[Site]) -> int:
            return sum(2 * s.d_out for s in sites)

    assert Fresh.__name__ not in REGISTRY
    assert Fresh.training == Fresh().training_defaults() == TrainingDefaults()


def test_a_rate_is_no_setting() -> None:
    assert "rate" not in LoRA().model_dump()
    assert "rate" not in LoRA.model_json_schema()["properties"]
    with pytest.raises(KitoutError, match="rate"):
        LoRA(training=1e-3)


@pytest.mark.parametrize("method", [LoRA(rank=2), LoRA(rank=2, dora=True), LoRA(rank=2, init="pissa"), PrefixTuning()])
def test_what_learns_faster_is_a_parameter(method: Method, tiny_llama: nn.Module) -> None:
    kit = kitout.attach(tiny_llama)
    adapter = kit.add("a", method, seed=0)
    for site in adapter.sites:
        delta = adapter.delta(site)
        assert [delta.get_parameter(name).shape[0] for name in delta.loraplus_parameters] == [site.d_out] * len(
            delta.loraplus_parameters
        )
        assert bool(delta.loraplus_parameters) == isinstance(method, LoRA)
