"""Settings no method can have: refused when the method is made (or placed), with the setting and the value in words."""

from __future__ import annotations

import re

import pytest

import kitout
from kitout import (
    IA3,
    SSF,
    AdaptFormer,
    BitFit,
    FullFineTuning,
    Houlsby,
    LoRA,
    ParallelAdapter,
    PartialFineTuning,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
)
from kitout.errors import ConfigError, TargetError
from kitout.method import REGISTRY
from zoo import EXTRA, ZOO

INF, NAN = float("inf"), float("nan")

BAD = [
    (lambda: LoRA(rank=0), "rank", "0"),
    (lambda: LoRA(rank=-3), "rank", "-3"),
    (lambda: LoRA(rank={"attn.q": 0}), "rank", "0"),
    (lambda: LoRA(rank="eight"), "rank", "eight"),
    (lambda: LoRA(rank=True), "rank", "true"),  # numbers, which pydantic takes it for
    (lambda: LoRA(rank={"attn.q": True}), "rank", "true"),
    (lambda: PrefixTuning(encoder=True), "encoder", "true"),
    (lambda: PromptTuning(init=(True, 2)), "init", "true"),
    (lambda: PromptTuning(init=((True, 2),)), "init", "true"),
    (lambda: LoRA(dropout=False), "dropout", "false"),
    (lambda: LoRA(alpha=0), "alpha", "0"),
    (lambda: LoRA(alpha={"attn.*": -1.0}), "alpha", "-1.0"),
    (lambda: LoRA(alpha=NAN), "alpha", "nan"),
    (lambda: LoRA(dropout=1.0), "dropout", "1.0"),
    (lambda: LoRA(dropout=-0.1), "dropout", "-0.1"),
    (lambda: LoRA(init="random"), "init", "random"),
    (lambda: LoRA(dora=True, init="pissa"), "dora", "pissa"),
    (lambda: LoRA(rnak=8), "rnak", "8"),
    (lambda: IA3(preset="kv"), "preset", "kv"),
    (lambda: BitFit(everywhere="perhaps"), "everywhere", "perhaps"),
    (lambda: SSF(std=-0.1), "std", "-0.1"),
    (lambda: SSF(std=INF), "std", "inf"),
    (lambda: Houlsby(width=0), "width", "0"),
    (lambda: Houlsby(width=2.5), "width", "2.5"),
    (lambda: Houlsby(std=0.0), "std", "0.0"),  # both projections 0: neither would ever get a gradient
    (lambda: Houlsby(std=INF), "std", "inf"),
    (lambda: Houlsby(activation="sine"), "activation", "sine"),
    (lambda: Houlsby(norms=None), "norms", "None"),
    (lambda: Pfeiffer(width=-1), "width", "-1"),
    (lambda: Pfeiffer(std=0.0), "std", "0.0"),
    (lambda: Pfeiffer(std=NAN), "std", "nan"),
    (lambda: ParallelAdapter(width=0), "width", "0"),
    (lambda: ParallelAdapter(scale="trained"), "scale", "trained"),
    (lambda: ParallelAdapter(scale=NAN), "scale", "nan"),
    (lambda: ParallelAdapter(scale=0.0), "scale", "0.0"),  # its parameters would be dead
    (lambda: ParallelAdapter(dropout=1.0), "dropout", "1.0"),
    (lambda: AdaptFormer(width=0), "width", "0"),
    (lambda: AdaptFormer(scale=INF), "scale", "inf"),
    (lambda: AdaptFormer(scale=0), "scale", "0"),
    (lambda: AdaptFormer(dropout=2), "dropout", "2"),
    (lambda: PartialFineTuning(), "exactly one", "nothing"),
    (lambda: PartialFineTuning(last=0), "last", "0"),
    (lambda: PartialFineTuning(last=2, part="head"), "exactly one", "last=2"),
    (lambda: PartialFineTuning(part="tail"), "part", "tail"),
    (lambda: PartialFineTuning(names="  "), "names", "empty"),
    (lambda: PartialFineTuning(last=1, targets="attn.q"), "targets", "attn.q"),
    (lambda: PartialFineTuning(part="norms", layers="last:1"), "layers", "last:1"),
    (lambda: FullFineTuning(training=1), "training", "1"),
]


@pytest.mark.parametrize(("make", "setting", "value"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_settings_are_named_with_their_value(make, setting, value) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    text = str(caught.value)
    assert setting in text
    assert re.search(rf"(?<![\w.]){re.escape(value)}(?!\w)", text), text


def test_several_bad_settings_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Houlsby(width=0, std=-1.0, activation="sine")
    assert all(word in str(caught.value) for word in ("width=0", "std=-1.0", "activation='sine'"))


def test_methods_are_values() -> None:
    for name, method in REGISTRY.items():
        made = (
            method(last=1)
            if name == "PartialFineTuning"
            else method(length=4)
            if "length" in method.model_fields
            else method()
        )
        with pytest.raises(Exception, match="frozen"):
            made.layers = "last:1"
        assert made == type(made)(**made.model_dump()), name


PLACED = [
    ("bert", lambda: LoRA(rank=49), ConfigError, "49"),
    ("bert", lambda: LoRA(rank={"mlp.*": 4}), ConfigError, "attn.q"),
    ("vit", lambda: PartialFineTuning(last=4), TargetError, "4"),
    ("vit", lambda: PartialFineTuning(names="vit.layer.*"), TargetError, "vit.layer.*"),
    ("vit", lambda: PartialFineTuning(names="*.bias *.bais"), TargetError, "*.bais"),
    ("vit", lambda: FullFineTuning(targets="in:mlp.down"), ConfigError, "in:mlp.down"),
    ("vit", lambda: FullFineTuning(targets="embed"), TargetError, "embed"),
    ("vit", lambda: AdaptFormer(targets="sub.cross"), TargetError, "sub.cross"),
    ("llama", lambda: SSF(targets="patch"), TargetError, "patch"),
    ("llama", lambda: Houlsby(layers="last:3"), TargetError, "last:3"),
    ("t5", lambda: Pfeiffer(layers="middle/last:1"), TargetError, "middle"),
]


@pytest.mark.parametrize(("name", "make", "error", "said"), PLACED, ids=[f"{n}-{s}" for n, _, _, s in PLACED])
def test_what_a_model_does_not_have_is_refused_and_changes_nothing(name, make, error, said) -> None:
    specimen = {**ZOO, **EXTRA}[name]
    kit = kitout.attach(specimen.build())
    with pytest.raises(error, match=re.escape(said)):
        kit.add("a", make())
    assert kit.names == []


def test_packed_parameters_cannot_be_trained() -> None:
    import torch
    from torch import nn

    kit = kitout.attach(ZOO["llama"].build())
    linear = kit.base.get_submodule("model.layers.0.mlp.down_proj")
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"down_proj.weight is held as torch.int8"):
        kit.add("a", FullFineTuning())


@pytest.mark.parametrize(
    "method", [Houlsby(width=2), Pfeiffer(width=2), ParallelAdapter(width=2), AdaptFormer(width=2)]
)
def test_what_is_not_linear_cannot_be_merged_and_says_where(method) -> None:
    assert not method.mergeable
    for name in ("llama", "bert"):
        kit = kitout.attach(ZOO[name].build())
        kit.add("a", method)
        with pytest.raises(kitout.errors.NotMergeable, match=r"layers?\.0"):
            kit.merge("a")
        assert not kit.merged


def test_a_shift_has_no_place_in_a_norm_without_one() -> None:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", SSF(targets="norm"))
    with pytest.raises(kitout.errors.NotMergeable, match=r"input_layernorm.*a scale, not a shift"):
        kit.merge("a")


def test_an_input_is_not_scaled_into_a_norm() -> None:
    """Scaling what a norm reads is no change of its weights."""
    kit = kitout.attach(ZOO["bert"].build())
    kit.add("a", IA3(targets="in:norm"))
    with pytest.raises(kitout.errors.NotMergeable, match="input of a"):
        kit.merge("a")
