"""Over a quantized base LoRA and the activation methods train in the loop, and a run resumes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import kitout
from kitout import IA3, Kit, LoRA
from kitout.errors import ConfigError
from kitout.train import checkpoints
from kitout.train.loop.base_mode import training_mode
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.objectives.lm_head_loss import HeadLoss
from kitout.train.setup.quantization import BNB_CPU_FLAG, keep_nf4_trainable
from runtime.test_quantized import bitsandbytes_4, bitsandbytes_8, torchao_int8
from train.fixtures import add, causal, far, gradients, job, loop_of, losses, texts, trained, values
from zoo import VOCAB

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own, at import and at each product
KINDS = {"torchao": torchao_int8, "bitsandbytes 8": bitsandbytes_8, "bitsandbytes 4": bitsandbytes_4}


@pytest.mark.parametrize(
    ("kind", "head"), [("torchao", True), ("bitsandbytes 8", True), ("bitsandbytes 4", False), ("bitsandbytes 4", True)]
)
def test_adapters_train_over_a_quantized_base(tmp_path: Path, kind: str, head: bool) -> None:
    quantize = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(quantize.__name__.split("_")[0])

    def build() -> tuple[Kit, list[object]]:
        model = quantize(small())
        if head:
            quantize_head(model, quantize)
        kit = kitout.attach(keep_nf4_trainable(model)).eval()
        names = {"low": LoRA(rank=4, targets="all-linear"), "scale": IA3()}
        for name, method in names.items():
            kit.add(name, method, seed=0)
        items = texts(8)
        return kit, [job(name, causal(kit, list(names), items), items, steps=6, batch=4) for name in names]

    kit, jobs = build()
    assert jobs[0].objective.head.mode == ("selected" if head else "chunked")
    loop = trained(kit, jobs, tmp_path, save_strategy="steps", save_steps=3)
    assert losses(loop)[-1] < 0.99 * losses(loop)[0]
    again, others = build()
    second = loop_of(again, others, tmp_path, save_strategy="no")
    second.train(str(checkpoints.list_checkpoints(tmp_path)[0]))
    for name in ("low", "scale"):
        assert all(torch.equal(value, values(again, name)[key]) for key, value in values(kit, name).items())
        kit.save(name, tmp_path / "kept" / name)
        with again.use(None):
            again.load(tmp_path / "kept" / name, name=f"{name}-again")


def small() -> nn.Module:
    """bitsandbytes' kernel for CPUs wants widths that 32 divides."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": VOCAB + 29}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2)).eval()


def test_an_evaluation_before_does_not_cut_the_gradients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
    items, grads = texts(8), {}
    for is_evaluated in (False, True):
        kit = kitout.attach(keep_nf4_trainable(bitsandbytes_4(small()))).eval()
        add(kit, "low", LoRA(rank=4, targets="all-linear"))
        objective = CausalLM(kit)
        objective.head = HeadLoss(kit, "chunked")
        one = job("low", objective, items, batch=8)
        if is_evaluated:
            with torch.no_grad(), kit.use("low"):
                objective.losses(kit, objective.collate(items, None), torch.ones(8))
        with training_mode(kit, ["low"], False):
            grads[is_evaluated] = gradients(kit, [one], 8)
    assert far(grads[True], grads[False]) == 0


def test_repacked_weights_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
    model = bitsandbytes_4(small())
    if not any(getattr(module, BNB_CPU_FLAG, False) for module in model.modules()):
        pytest.skip("this CPU has no such layout")
    kit = kitout.attach(model).eval()
    add(kit, "low", LoRA(rank=4))
    with torch.no_grad():
        kit(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ConfigError, match=r"keep_nf4_trainable\(model\) before"), training_mode(kit, ["low"], False):
        pass


def quantize_head(model: nn.Module, quantize: Callable[[nn.Module], nn.Module]) -> None:
    """The zoo's quantizers leave a language model's head alone: by another name it is not."""
    holder = nn.Module()
    holder.other = model.lm_head
    quantize(holder)
    model.lm_head = holder.other
