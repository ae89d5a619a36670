"""Names of methods without case, hyphens and underscores; variants; and what a name elsewhere is called here."""

from __future__ import annotations

from typing import Any

import pytest

from kitout import LoRA, PartialFineTuning
from kitout.errors import ConfigError
from kitout.method import REGISTRY
from kitout.methods import VPT, PrefixTuning
from kitout.train.config import overrides
from kitout.train.config.load import load
from kitout.train.config.method_field import VARIANTS, find_method, names_a_method

MINIMAL = {"model": "m", "data": "d"}


@pytest.mark.parametrize("name", REGISTRY)
def test_any_spelling_of_a_name(name: str) -> None:
    if REGISTRY[name].__module__.startswith("kitout."):
        assert names_a_method(name)
    for spelling in (name, name.lower(), name.upper(), "-".join(name), "_".join(name.lower())):
        assert find_method(spelling) == (REGISTRY[name], {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_a_method_with_a_setting(variant: str) -> None:
    class_name, settings = VARIANTS[variant]
    assert names_a_method(variant)
    assert find_method(variant.replace("-", "_").upper()) == (REGISTRY[class_name], settings)


@pytest.mark.parametrize(
    ("written", "method"),
    [
        ("lora", LoRA()),
        ("prefix-tuning", PrefixTuning()),
        ("vpt-deep", VPT(deep=True)),
        ({"name": "VPT_deep", "length": 5}, VPT(deep=True, length=5)),
        ({"name": "dora", "rank": 4}, LoRA(dora=True, rank=4)),
        ({"name": "linear"}, PartialFineTuning(part="head")),
    ],
)
def test_wherever_a_method_is_written(written: Any, method: Any) -> None:
    config = load({**MINIMAL, "method": written, "jobs": [{"name": "a", "method": written}]})
    assert config.method == method
    assert config.per_job()[0].method == method
    assert load(config.to_dict()) == config


def test_on_the_command_line() -> None:
    run = overrides.build_config(None, ["model=m", "data=d", ("method", "vpt-deep"), "method.length=3"])
    assert run.method == VPT(deep=True, length=3)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"name": "vpt-deep", "deep": False}, "method.deep: vpt-deep is VPT with deep=True: leave it out"),
        ("qlora", "write method=LoRA and model.quantization=nf4"),
        ("prefix", "did you mean 'PrefixTuning'?"),
        ("vtp-deep", "did you mean 'vpt-deep'"),
        ("", "known: AdaptFormer"),
        ({"name": "LoRA", "r": 8}, "method.r: LoRA has no such setting; write method.rank"),
        ({"name": "IA3", "r": 8}, "method.r: IA3 has no such setting; known: 'targets'"),
        ({"name": "lora", "target_modules": "q"}, "write method.targets"),
        ({"name": "lora", "learning_rate": 1}, "write train.lr"),
    ],
)
def test_errors_say_what_to_write(written: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load({**MINIMAL, "method": written})
    assert message in str(error.value)
