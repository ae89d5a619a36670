"""Parameter groups hold each parameter once, with its learning rate and weight decay; an absurd rate is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kitout
from kitout import (
    IA3,
    BitFit,
    FullFineTuning,
    Houlsby,
    LoRA,
    Method,
    PartialFineTuning,
    PrefixTuning,
    PromptTuning,
)
from kitout.errors import KitoutError
from kitout.method import registered_methods
from kitout.runtime.adapter import Adapter
from kitout.train.loop.optimizer import check_learning_rate, parameter_groups, refuse_above, warn_above
from laws.cases import CASES
from tiny_vision import kit as vision_kit
from zoo import ZOO


def adapter_of(method: Method, heads: dict[str, nn.Module] | None = None) -> Adapter:
    return kitout.attach(ZOO["llama"].build()).add("a", method, seed=0, heads=heads)


def by_name(adapter: Adapter, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter by its name."""
    names = {id(value): name for name, value in adapter.named_parameters()}
    return {names[id(v)]: (g["lr"], g["weight_decay"]) for g in groups for v in g["params"]}


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.refused(ZOO["llama"]) and not c.parts], ids=lambda c: c.name
)
def test_groups_hold_every_parameter_once(case: Any) -> None:
    adapter = adapter_of(
        case.method.without_start(), {"lm_head": nn.Linear(ZOO["llama"].width, 5)} if "lora" in case.name else None
    )
    groups = parameter_groups(adapter)
    ids = [id(value) for group in groups for value in group["params"]]
    assert sorted(ids) == sorted(map(id, adapter.parameters()))
    assert len(set(ids)) == len(ids)
    assert len({(g["lr"], g["weight_decay"]) for g in groups}) == len(groups)
    optimizer = torch.optim.AdamW(groups)
    assert [g["full"] for g in optimizer.param_groups] == [g["lr"] for g in groups]
    defaults = case.method.training_defaults()
    assert {lr for lr, _ in by_name(adapter, groups).values()} <= {defaults.lr, defaults.head_lr}


def test_lora_plus_trains_b_faster_and_nothing_else() -> None:
    for method in (LoRA(rank=2), LoRA(rank=2, dora=True)):
        adapter = adapter_of(method, {"lm_head": nn.Linear(ZOO["llama"].width, 5)})
        settings = by_name(adapter, parameter_groups(adapter, 1e-3, weight_decay=0.1, head_lr=5e-3, loraplus_ratio=16))
        for name, (lr, decay) in settings.items():
            if name.startswith("heads."):
                assert (lr, decay) == (5e-3, 0.1 if name.endswith("weight") else 0.0)
            elif name.endswith(".b"):
                assert (lr, decay) == (16e-3, 0.1)
            else:
                assert (lr, decay) == (1e-3, 0.1 if name.endswith(".a") else 0.0)  # a magnitude has one dimension
        assert sum(name.endswith(".b") for name in settings) == len(adapter.sites)


def test_lora_plus_on_a_method_without_b_is_refused() -> None:
    with pytest.raises(KitoutError, match=r"loraplus_lr_ratio=16 is LoRA\+'s, of B to A, and IA3 has neither"):
        parameter_groups(adapter_of(IA3()), loraplus_ratio=16)


@pytest.mark.parametrize(
    "method",
    [IA3(), BitFit(), PromptTuning(length=3), PrefixTuning(length=4), PrefixTuning(length=4, encoder=6)],
    ids=["ia3", "bitfit", "prompt", "prefix", "prefix-encoder"],
)
def test_scales_shifts_prompts_and_prefixes_do_not_decay(method: Method) -> None:
    adapter = adapter_of(method, {"lm_head": nn.Linear(ZOO["llama"].width, 5)})
    for name, (_, decay) in by_name(adapter, parameter_groups(adapter, weight_decay=0.1)).items():
        assert decay == (0.1 if name == "heads.lm_head.module.weight" else 0.0), name


def test_matrices_decay_and_vectors_do_not() -> None:
    for method in (Houlsby(width=3), FullFineTuning(), PartialFineTuning(last=1)):
        adapter = adapter_of(method)
        values = dict(adapter.named_parameters())
        for name, (_, decay) in by_name(adapter, parameter_groups(adapter, weight_decay=0.1)).items():
            assert decay == (0.1 if values[name].ndim > 1 else 0.0), name


def test_a_head_of_an_image_model_has_its_own_rate() -> None:
    kit = vision_kit()
    adapter = kit.add("a", kitout.VPT(length=2), seed=0, heads={"classifier": nn.Linear(64, 3)})
    rates = {
        name.split(".")[0]: lr for name, (lr, _) in by_name(adapter, parameter_groups(adapter, head_lr=7e-3)).items()
    }
    assert rates == {"deltas": kitout.VPT.training.lr, "heads": 7e-3}


def test_all_errors_are_reported_together() -> None:
    with pytest.raises(KitoutError) as caught:
        parameter_groups(adapter_of(IA3()), -1.0, weight_decay=float("nan"), head_lr=float("inf"), loraplus_ratio=0.0)
    assert all(word in str(caught.value) for word in ("lr=-1.0", "decay=nan", "head_lr=inf", "ratio=0.0"))


@pytest.mark.parametrize("method", list(registered_methods()), ids=lambda m: m.__name__)
def test_a_rate_far_from_the_default_is_warned_of(method: type[Method]) -> None:
    default = method.training.lr
    assert check_learning_rate(method, default) is None
    assert check_learning_rate(method, 5 * default) is None
    assert check_learning_rate(method, default / 30) is None
    assert f"times {method.__name__}'s default of {default:g}" in str(check_learning_rate(method, warn_above(method)))
    assert "may not learn" in str(check_learning_rate(method, default / 1000))
    for absurd in (refuse_above(method), 1000 * default):
        with pytest.raises(
            KitoutError, match=f"for {method.__name__} is .* times its default of {default:g}.* write lr="
        ):
            check_learning_rate(method, absurd)


@pytest.mark.parametrize("bad", [0.0, -1e-3, float("nan"), float("inf")])
def test_what_is_not_a_rate_is_refused(bad: float) -> None:
    with pytest.raises(KitoutError, match="write a number above 0; its default is"):
        check_learning_rate(LoRA(), bad)
