"""The loss over a frozen head in one pass: equal to autograd over all logits, without their tensor, or not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import kitout
from kitout import IA3, LoRA, PartialFineTuning
from kitout.train.objectives import chunked_cross_entropy as chunked
from kitout.train.objectives.chunked_cross_entropy import at_least_float32, chunked_cross_entropy
from kitout.train.objectives.lm_head_loss import HeadLoss
from train.fixtures import add, causal, far, gradients, job, kit_of, texts
from zoo import VOCAB, D


def by_autograd(h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    h = h.detach().clone().requires_grad_()
    total = (weights * F.cross_entropy(at_least_float32(F.linear(h, w, b)), labels, reduction="none")).sum()
    total.backward()
    assert h.grad is not None
    return total.detach(), h.grad


@pytest.mark.parametrize("chunk", [1, 4 * 37 * 3, 4 * 37 * 1000], ids=["one row", "three rows", "whole"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("form", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_one_pass_is_autograd(
    form: torch.dtype, close: float, biased: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", chunk)
    h, w, b = torch.randn(10, 16).to(form), torch.randn(37, 16).to(form), torch.randn(37).to(form)
    labels, weights = torch.randint(0, 37, (10,)), torch.rand(10)
    weights[3] = 0
    bias = b if biased else None
    wanted, gradient = by_autograd(h, w, bias, labels, weights)
    h.requires_grad_()
    total, nll, right = chunked_cross_entropy(h, w, bias, labels, weights)
    (3 * total).backward()
    assert h.grad is not None
    torch.testing.assert_close(total.detach().double(), wanted.double(), rtol=max(close, 1e-7), atol=0)
    scale = gradient.abs().max()
    assert ((h.grad - 3 * gradient).abs().max() / scale / 3).item() <= close
    assert torch.equal(right, F.linear(h.detach(), w, bias).argmax(1) == labels)
    assert nll.shape == (10,)
    assert not h.grad[3].any()


def test_a_tiny_weight_is_not_rounded_to_nothing() -> None:
    h, w = torch.randn(4, 16).half().requires_grad_(), torch.randn(37, 16).half()
    total, *_ = chunked_cross_entropy(h, w, None, torch.zeros(4, dtype=torch.long), torch.full((4,), 1e-9))
    (total * 2.0**30).backward()  # as a gradient scaler does
    assert h.grad is not None
    assert h.grad.any()
    assert h.grad.isfinite().all()


def test_no_learnt_position_is_a_loss_of_nothing() -> None:
    h = torch.randn(3, 16, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    total, *_ = chunked_cross_entropy(h[none], torch.randn(37, 16), None, none, torch.zeros(0))
    total.backward()
    assert total.item() == 0
    assert h.grad is not None
    assert not h.grad.any()


@pytest.mark.parametrize(
    ("species", "way"),
    [("llama", "chunked"), ("llama-tied", "chunked"), ("gpt2", "chunked"), ("gpt-neox", "chunked"),
     ("gptj", "chunked"), ("opt", "chunked"), ("mpt", "chunked"), ("falcon", "chunked"), ("gemma2", "selected")],
)  # fmt: skip
def test_the_cheapest_exact_way_is_found_and_equals_whole_logits(species: str, way: str) -> None:
    kit = kit_of(species)
    add(kit, "low", LoRA(rank=2, targets="all-linear"))
    items = texts(6)
    objective = causal(kit, ["low"], items)
    assert objective.head.mode == way
    assert_equals_whole(kit, objective, items)


def test_a_cap_too_wide_for_these_logits_is_still_found() -> None:
    kit = kit_of("gemma2")
    kit.config.final_logit_softcapping = 1e5  # logits of a few: a comparison of losses could not tell
    add(kit, "low", LoRA(rank=2))
    assert causal(kit, ["low"], texts(4)).head.mode == "selected"


@pytest.mark.parametrize("way", ["lora", "replaced", "trained"])
@pytest.mark.parametrize("species", ["llama", "gpt2"])
def test_a_head_that_learns_is_never_taken_for_frozen(species: str, way: str) -> None:
    kit = kit_of(species)
    heads = {"lm_head": nn.Linear(D, VOCAB)} if way == "replaced" else None
    made: dict[str, Any] = {
        "lora": LoRA(rank=2, targets="head"), "replaced": LoRA(rank=2), "trained": PartialFineTuning(part="head")
    }  # fmt: skip
    add(kit, "low", made[way], heads)
    items = texts(6)
    objective = causal(kit, ["low"], items)
    assert objective.head.mode == "selected"
    assert_equals_whole(kit, objective, items)


def test_one_adapter_on_the_head_speaks_for_all_jobs() -> None:
    kit = kit_of("llama")
    add(kit, "scale", IA3())
    add(kit, "head", LoRA(rank=2, targets="head"))
    assert causal(kit, ["scale", "head"], texts(6)).head.mode == "selected"
    assert causal(kit, ["scale"], texts(6)).head.mode == "chunked"


def assert_equals_whole(kit: Any, objective: Any, items: Any) -> None:
    one = job("low", objective, items, batch=6)
    found = gradients(kit, [one], micro=3)
    objective.head = HeadLoss(kit, "full")
    wanted = gradients(kit, [one], micro=6)
    assert far(found, wanted) <= 2e-6


class Sizes(TorchDispatchMode):
    """The most numbers any tensor held that a computation made, forward and backward; parameters do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.most, self.there = 0, {value.untyped_storage().data_ptr() for value in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.there:
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


def test_no_tensor_as_large_as_the_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": D, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    kit = kitout.attach(LlamaForCausalLM(LlamaConfig(vocab_size=2000, **sizes))).eval()
    add(kit, "low", LoRA(rank=2))
    items = texts(8, low=20, high=24)
    objective = causal(kit, ["low"], items)
    assert objective.head.mode == "chunked"
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 2000 * 5)  # five tokens at a time
    one = job("low", objective, items, batch=8)
    learnt, most = one.num_targets(0), {}
    for way in ("chunked", "selected"):
        objective.head = HeadLoss(kit, way)
        with Sizes(kit.base) as found:
            gradients(kit, [one], micro=8)
        most[way] = found.most
    assert learnt > 50
    assert most["selected"] >= learnt * 2000
    assert most["chunked"] <= max(8 * 24 * 80, 5 * 2000)  # a feed-forward's activations, or one chunk
