"""The chunked loss over a frozen head equals autograd over all logits without their tensor, or it is not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GitConfig, GitForCausalLM, LlamaConfig, LlamaForCausalLM

import kitout
from kitout import IA3, FullFineTuning, LoRA, PartialFineTuning
from kitout.train.objectives import chunked_cross_entropy as chunked
from kitout.train.objectives.chunked_cross_entropy import at_least_float32, chunked_cross_entropy
from kitout.train.objectives.lm_head_loss import HeadLoss, check_causal
from train.fixtures import LargestTensor, add, causal, far, gradients, job, kit_of, texts
from zoo import VOCAB, D


def by_autograd(h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    h = h.detach().clone().requires_grad_()
    total = (weights * F.cross_entropy(at_least_float32(F.linear(h, w, b)), labels, reduction="none")).sum()
    total.backward()
    assert h.grad is not None
    return total.detach(), h.grad


@pytest.mark.parametrize("chunk", [1, 4 * 37 * 3, 4 * 37 * 1000], ids=["one row", "three rows", "whole"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_chunked_equals_autograd(
    dtype: torch.dtype, tolerance: float, has_bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", chunk)
    h, w, b = torch.randn(10, 16).to(dtype), torch.randn(37, 16).to(dtype), torch.randn(37).to(dtype)
    labels, weights = torch.randint(0, 37, (10,)), torch.rand(10)
    weights[3] = 0
    bias = b if has_bias else None
    expected, gradient = by_autograd(h, w, bias, labels, weights)
    h.requires_grad_()
    total, nll, is_correct = chunked_cross_entropy(h, w, bias, labels, weights)
    (3 * total).backward()
    assert h.grad is not None
    torch.testing.assert_close(total.detach().double(), expected.double(), rtol=max(tolerance, 1e-7), atol=0)
    scale = gradient.abs().max()
    assert ((h.grad - 3 * gradient).abs().max() / scale / 3).item() <= tolerance
    assert torch.equal(is_correct, F.linear(h.detach(), w, bias).argmax(1) == labels)
    assert nll.shape == (10,)
    assert not h.grad[3].any()


def test_a_tiny_weight_is_not_rounded_to_zero() -> None:
    h, w = torch.randn(4, 16).half().requires_grad_(), torch.randn(37, 16).half()
    total, *_ = chunked_cross_entropy(h, w, None, torch.zeros(4, dtype=torch.long), torch.full((4,), 1e-9))
    (total * 2.0**30).backward()  # as a gradient scaler does
    assert h.grad is not None
    assert h.grad.any()
    assert h.grad.isfinite().all()


def test_without_target_positions_the_loss_is_zero() -> None:
    h = torch.randn(3, 16, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    total, *_ = chunked_cross_entropy(h[none], torch.randn(37, 16), None, none, torch.zeros(0))
    total.backward()
    assert total.item() == 0
    assert h.grad is not None
    assert not h.grad.any()


@pytest.mark.parametrize(
    ("species", "mode"),
    [("llama", "chunked"), ("llama-tied", "chunked"), ("gpt2", "chunked"), ("gpt-neox", "chunked"),
     ("gptj", "chunked"), ("opt", "chunked"), ("mpt", "chunked"), ("falcon", "chunked"), ("gemma2", "selected")],
)  # fmt: skip
def test_the_cheapest_exact_mode_is_chosen_and_equals_all_logits(species: str, mode: str) -> None:
    kit = kit_of(species)
    add(kit, "low", LoRA(rank=2, targets="all-linear"))
    items = texts(6)
    objective = causal(kit, ["low"], items)
    assert objective.head.mode == mode
    assert_equals_full(kit, objective, items)


def test_a_soft_cap_far_above_these_logits_is_still_found() -> None:
    kit = kit_of("gemma2")
    kit.config.final_logit_softcapping = 1e5  # logits of a few: a comparison of losses could not tell
    add(kit, "low", LoRA(rank=2))
    assert causal(kit, ["low"], texts(4)).head.mode == "selected"


@pytest.mark.parametrize("change", ["lora", "replaced", "trained"])
@pytest.mark.parametrize("species", ["llama", "gpt2"])
def test_a_head_that_is_trained_is_never_taken_for_frozen(species: str, change: str) -> None:
    kit = kit_of(species)
    heads = {"lm_head": nn.Linear(D, VOCAB)} if change == "replaced" else None
    methods: dict[str, Any] = {
        "lora": LoRA(rank=2, targets="head"), "replaced": LoRA(rank=2), "trained": PartialFineTuning(part="head")
    }  # fmt: skip
    add(kit, "low", methods[change], heads)
    items = texts(6)
    objective = causal(kit, ["low"], items)
    assert objective.head.mode == "selected"
    assert_equals_full(kit, objective, items)


def test_one_adapter_on_the_head_rules_out_chunks_for_all_jobs() -> None:
    kit = kit_of("llama")
    add(kit, "scale", IA3())
    add(kit, "head", LoRA(rank=2, targets="head"))
    assert causal(kit, ["scale", "head"], texts(6)).head.mode == "selected"
    assert causal(kit, ["scale"], texts(6)).head.mode == "chunked"


@pytest.mark.parametrize("change", ["lora", "replaced", "trained", "full"])
@pytest.mark.parametrize("species", ["llama", "llama-tied", "gemma2"])
def test_rows_with_heads_of_their_own_share_a_forward(species: str, change: str) -> None:
    kit, items = kit_of(species), texts(8)
    methods: dict[str, Any] = {
        "lora": LoRA(rank=2, targets="head attn.q"), "replaced": LoRA(rank=2), "full": FullFineTuning(),
        "trained": PartialFineTuning(part="head"),
    }  # fmt: skip
    for seed, name in enumerate("ab"):
        heads = {"lm_head": nn.Linear(D, VOCAB)} if change == "replaced" else None
        add(kit, name, methods[change], heads, seed=seed)
    add(kit, "low", LoRA(rank=2))
    jobs = [job(name, causal(kit, ["a", "b", "low"], items), items, batch=4) for name in ("a", "low", "b")]
    assert {one.objective.head.mode for one in jobs} == {"selected"}
    joint = gradients(kit, jobs, micro=12)
    for one in jobs:
        one.objective.head = HeadLoss(kit, "full")
    assert far(joint, {key: value for one in jobs for key, value in gradients(kit, [one], micro=4).items()}) <= 2e-6


def assert_equals_full(kit: Any, objective: Any, items: Any) -> None:
    one = job("low", objective, items, batch=6)
    chosen_mode = gradients(kit, [one], micro=3)
    objective.head = HeadLoss(kit, "full")
    full = gradients(kit, [one], micro=6)
    assert far(chosen_mode, full) <= 2e-6


def test_no_tensor_as_large_as_the_logits_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": D, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    kit = kitout.attach(LlamaForCausalLM(LlamaConfig(vocab_size=2000, **sizes))).eval()
    add(kit, "low", LoRA(rank=2))
    items = texts(8, low=20, high=24)
    objective = causal(kit, ["low"], items)
    assert objective.head.mode == "chunked"
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 2000 * 5)  # five tokens at a time
    one = job("low", objective, items, batch=8)
    num_targets, max_sizes = one.num_targets(0), {}
    for mode in ("chunked", "selected"):
        objective.head = HeadLoss(kit, mode)
        with LargestTensor(kit.base) as largest:
            gradients(kit, [one], micro=8)
        max_sizes[mode] = largest.max_size
    assert num_targets > 50
    assert max_sizes["selected"] >= num_targets * 2000
    assert max_sizes["chunked"] <= max(8 * 24 * 80, 5 * 2000)  # a feed-forward's activations, or one chunk


def test_images_in_front_of_a_causal_text_make_no_encoder() -> None:
    """GIT's texts see none of their later tokens; its images, which stand in front of them, see each other."""
    image = {"image_size": 16, "patch_size": 8}
    sizes: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends: Any = {"bos_token_id": 1, "eos_token_id": 2}
    config = GitConfig(vision_config={**sizes, **image}, vocab_size=64, **sizes, **ends)
    kit = kitout.attach(GitForCausalLM(config).eval())
    assert all(tower.causal is False for tower in kit.survey.towers)
    check_causal(kit)
