"""A quantised base: adapters train over it, an exact merge is refused by name, and off is still bit-identical.

torchao's int8 tensors and bitsandbytes' 8 and 4 bit linears, on the CPU; each is left out where it is not installed.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, BitFit, FullFineTuning, Kit, LoRA
from kitout.errors import ConfigError, NotMergeable, TargetError
from laws.activate import assert_same, run, untrivial
from zoo import ZOO, out, rows_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own, at import and at each product
LLAMA = ZOO["llama"]


def torchao_int8(model: nn.Module) -> nn.Module:
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda m, path: isinstance(m, nn.Linear) and path != "lm_head",
    )
    return model


def bitsandbytes_8(model: nn.Module) -> nn.Module:
    nn8 = importlib.import_module("bitsandbytes").nn
    for path, old in linears(model):
        new = nn8.Linear8bitLt(old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False)
        new.weight = nn8.Int8Params(old.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        put(model, path, new)
    return model.to("cpu")


def bitsandbytes_4(model: nn.Module) -> nn.Module:
    nn4 = importlib.import_module("bitsandbytes").nn
    for path, old in linears(model):
        new = nn4.Linear4bit(old.in_features, old.out_features, old.bias is not None, quant_type="nf4")
        new.weight = nn4.Params4bit(old.weight.data.clone(), requires_grad=False, quant_type="nf4")
        put(model, path, new.to("cpu"))
    return model


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


WAYS = [
    pytest.param(("torchao", torchao_int8), id="torchao int8"),
    pytest.param(("bitsandbytes", bitsandbytes_8), id="bitsandbytes 8 bit"),
    pytest.param(("bitsandbytes", bitsandbytes_4), id="bitsandbytes 4 bit"),
]


@pytest.fixture(params=WAYS)
def quantised(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    library, quantise = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library, reason=f"{library} is not installed")
        yield quantise(LLAMA.build())


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return LLAMA.batch(2, 0)


def test_adapters_train_over_a_quantised_base(quantised: nn.Module, batch: dict[str, Tensor]) -> None:
    base = run(quantised, batch)
    kit: Kit = kitout.attach(quantised)
    assert kit.survey.proven
    assert torch.equal(run(kit, batch), base)
    for name, method in {"low": LoRA(rank=2, targets="all-linear"), "scale": IA3(), "shift": BitFit()}.items():
        adapter = kit.add(name, method, seed=0)
        with kit.use(name):
            assert torch.equal(run(kit, batch), base), "a fresh one is the identity"
            out(kit(**batch)).square().mean().backward()
            assert all(p.grad is not None for p in adapter.parameters())
            untrivial(adapter)
            assert not torch.equal(run(kit, batch), base)
    with kit.use(["low", "scale"]):
        rows = run(kit, batch)
    for i, name in enumerate(("low", "scale")):
        with kit.use(name):
            assert_same(rows[i : i + 1], run(kit, rows_of(batch, i)), 2e-2)  # activations are rounded per tensor
    assert torch.equal(run(kit, batch), base)
    assert torch.equal(run(kit.detach(), batch), base)


def test_an_exact_merge_is_refused(quantised: nn.Module, batch: dict[str, Tensor]) -> None:
    kit = kitout.attach(quantised)
    untrivial(kit.add("low", LoRA(rank=2, targets="all-linear"), seed=0))
    with kit.use("low"):
        active = run(kit, batch)
    for merge in (kit.merge, kit.merged_copy):
        with pytest.raises(NotMergeable) as error:
            merge("low")
        assert "model.layers.0.self_attn.q_proj" in str(error.value)
        assert "plain floating-point" in str(error.value)
    with kit.use("low"):
        assert torch.equal(run(kit, batch), active)


def test_what_starts_from_the_weight_is_refused(quantised: nn.Module) -> None:
    kit = kitout.attach(quantised)
    for method in (LoRA(rank=2, dora=True), LoRA(rank=2, init="pissa")):
        with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj"):
            kit.add("new", method)
    with pytest.raises(TargetError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        kit.add("new", FullFineTuning(targets="attn.q"))
    assert kit.names == []
