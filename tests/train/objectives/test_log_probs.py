"""Log-probabilities with their gradient and entropies, by each way, equal torch's own over all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import kitout
from kitout import Kit, LoRA, PartialFineTuning
from kitout.data.by_row import sum_by_row
from kitout.data.encode.item import EncodedExample
from kitout.train.objectives import chunked_cross_entropy as chunked
from kitout.train.objectives.answer_rows import collate_rows
from kitout.train.objectives.chunked_cross_entropy import chunked_log_probs, log_prob_terms
from kitout.train.objectives.lm_head_loss import HeadLoss
from train.fixtures import LargestTensor, add, far, kit_of, texts
from zoo import VOCAB, D

TermsFn = Callable[[Tensor], tuple[Tensor, Tensor]]


def by_torch(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def preference(log_probs: Tensor) -> Tensor:
    """Some function that is not linear in them, as DPO's, and that leaves one position out."""
    half = len(log_probs) // 2
    return F.softplus(log_probs[:half].sum() - log_probs[half:-1].sum()) + (0.3 * log_probs[:-1].exp()).sum()


def results(h: Tensor, terms: TermsFn) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and the gradient of `preference` for h."""
    h = h.detach().clone().requires_grad_()
    log_probs, entropy = terms(h)
    preference(log_probs).backward()
    assert h.grad is not None
    return log_probs.detach().double(), entropy.detach().double(), h.grad.double()


@pytest.mark.parametrize("chunk", [1, 4 * 37 * 3, 4 * 37 * 1000], ids=["one row", "three rows", "whole"])
@pytest.mark.parametrize("way", ["chunked", "logits"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_log_probs_and_entropy_equal_torch(
    dtype: torch.dtype, tolerance: float, way: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(chunked, "ENTROPY_BYTES", chunk // 2)
    h, w, b = torch.randn(10, 16).to(dtype), torch.randn(37, 16).to(dtype), torch.randn(37).to(dtype)
    labels = torch.randint(0, 37, (10,))
    ways: dict[str, TermsFn] = {
        "chunked": lambda h: chunked_log_probs(h, w, b, labels),
        "logits": lambda h: log_prob_terms(F.linear(h, w, b), labels),
    }
    expected = results(h, lambda h: by_torch(F.linear(h, w, b), labels))
    found = results(h, ways[way])
    for value, reference in zip(found, expected, strict=True):
        assert ((value - reference).abs().max() / reference.abs().max()).item() <= tolerance
    assert not found[2][-1].any(), "no gradient comes in there"


def test_the_entropy_has_no_gradient_and_an_impossible_token_adds_nothing_to_it() -> None:
    h, w, b = torch.randn(4, 16, requires_grad=True), torch.randn(37, 16), torch.zeros(37)
    b[5] = -torch.inf
    labels = torch.tensor([0, 1, 2, 3])
    expected = by_torch(F.linear(h, w)[:, [i for i in range(37) if i != 5]], labels)
    for log_probs, entropy in (chunked_log_probs(h, w, b, labels), log_prob_terms(F.linear(h, w, b), labels)):
        torch.testing.assert_close((log_probs, entropy), expected)
        assert log_probs.requires_grad
        assert not entropy.requires_grad


def test_a_tiny_gradient_is_not_rounded_to_zero_and_no_position_gives_no_value() -> None:
    h, w = torch.randn(4, 16).half().requires_grad_(), torch.randn(37, 16).half()
    log_probs, _ = chunked_log_probs(h, w, None, torch.zeros(4, dtype=torch.long))
    (log_probs.sum() * 1e-9 * 2.0**30).backward()  # as a gradient scaler does
    assert h.grad is not None
    assert h.grad.any()
    none = torch.zeros(0, dtype=torch.long)
    assert [len(values) for values in chunked_log_probs(h[none], w, None, none)] == [0, 0]


def answers(kit: Kit, head: HeadLoss, items: list[EncodedExample]) -> dict[str, Tensor]:
    """Log-probabilities, entropies and every gradient of an adapter, of a DPO-like loss over its rows as pairs."""
    kit["low"].zero_grad()
    batch = collate_rows(items, kit.device)
    positions, labels, owners = (batch.targets[name] for name in ("positions", "labels", "owners"))
    with kit.use("low"):
        log_probs, entropy = head.log_probs(lambda: kit(**batch.inputs), positions, labels)
    sums = sum_by_row(log_probs, owners, len(items))
    F.softplus(sums[1::2] - sums[::2]).mean().backward()
    grads = {key: value.grad for key, value in kit["low"].named_parameters()}
    return {"log_probs": log_probs.detach(), "entropy": entropy, **grads}  # type: ignore[dict-item]


def choose(kit: Kit, items: list[EncodedExample]) -> HeadLoss:
    batch = collate_rows(items[:2], kit.device)
    targets = batch.targets
    with kit.use("low"):
        run_model = lambda: kit(**batch.inputs)  # noqa: E731
        return HeadLoss.choose(kit, ["low"], run_model, targets["positions"], targets["labels"], log_probs=True)


CASES = {
    "frozen": ("llama", "chunked"), "tied": ("llama-tied", "chunked"), "no bias": ("gpt2", "chunked"),
    "bias": ("gptj", "chunked"), "soft cap": ("gemma2", "selected"), "lora on it": ("llama", "selected"),
    "replaced": ("llama", "selected"), "trained": ("gpt2", "selected"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_each_way_equals_all_logits_on_a_model(case: str, dtype: torch.dtype, tolerance: float) -> None:
    species, mode = CASES[case]
    kit, items = kit_of(species, dtype=dtype), texts(6)
    methods: dict[str, Any] = {"lora on it": LoRA(rank=2, targets="head"), "trained": PartialFineTuning(part="head")}
    heads = {"lm_head": nn.Linear(D, VOCAB)} if case == "replaced" else None
    add(kit, "low", methods.get(case, LoRA(rank=2, targets="all-linear")), heads)
    head = choose(kit, items)
    assert head.mode == mode
    assert far(answers(kit, head, items), answers(kit, HeadLoss(kit, "full"), items)) <= tolerance


def test_in_half_precision_the_results_are_float32() -> None:
    kit, items = kit_of("llama", dtype=torch.bfloat16), texts(6)
    add(kit, "low", LoRA(rank=2))
    head = choose(kit, items)
    found, expected = answers(kit, head, items), answers(kit, HeadLoss(kit, "full"), items)
    assert head.mode == "chunked"
    assert found["log_probs"].dtype == found["entropy"].dtype == torch.float32
    assert far(found, expected) <= 2e-2


def test_a_way_whose_log_probabilities_differ_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kit, items = kit_of("llama"), texts(4)
    add(kit, "low", LoRA(rank=2))
    exact = HeadLoss.log_probs

    def swapped(self: HeadLoss, *call: Any) -> tuple[Tensor, Tensor]:
        log_probs, entropy = exact(self, *call)
        return log_probs.flip(0) if self.mode == "chunked" else log_probs, entropy  # with the same mean

    monkeypatch.setattr(HeadLoss, "log_probs", swapped)
    assert choose(kit, items).mode == "selected"


def test_no_tensor_as_large_as_the_logits_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": D, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    kit = kitout.attach(LlamaForCausalLM(LlamaConfig(vocab_size=2000, **sizes))).eval()
    add(kit, "low", LoRA(rank=2))
    items = texts(8, low=20, high=24)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 2000 * 5)  # five tokens at a time
    max_sizes = {}
    for mode in ("chunked", "selected"):
        with LargestTensor(kit.base) as largest:
            answers(kit, HeadLoss(kit, mode), items)
        max_sizes[mode] = largest.max_size
    num_targets = sum(item.num_targets for item in items)
    assert max_sizes["selected"] >= num_targets * 2000
    assert max_sizes["chunked"] <= max(8 * 24 * 80, 5 * 2000)  # a feed-forward's activations, or one chunk


def test_rows_are_collated_in_order_and_a_first_token_is_no_target() -> None:
    rows = [EncodedExample((5, 6, 7, 8), (-100, -100, 7, 8)), EncodedExample((9, 4), (9, 4))]
    batch = collate_rows(rows, torch.device("cpu"))
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert {name: values.tolist() for name, values in batch.targets.items()} == {
        "positions": [1, 2, 4], "labels": [7, 8, 4], "owners": [0, 0, 1]
    }  # fmt: skip
    assert (batch.num_examples, batch.num_tokens, batch.num_padded_tokens) == (2, 6, 8)
    values = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    sums = sum_by_row(values, batch.targets["owners"], 3)
    (sums * torch.tensor([2.0, 3.0, 7.0])).sum().backward()
    assert sums.tolist() == [3, 5, 0]
    assert values.grad is not None
    assert values.grad.tolist() == [2, 2, 3]


@pytest.mark.parametrize("way", ["chunked", "logits"])
def test_a_temperature_divides_logits_and_not_what_is_rounded_before_them(way: str) -> None:
    """In half precision h / 0.7 is rounded, and another pass that divides the logits would find another ratio."""
    h, w, labels = torch.randn(10, 64).bfloat16(), torch.randn(37, 64).bfloat16(), torch.randint(0, 37, (10,))
    ways: dict[str, TermsFn] = {
        "chunked": lambda h: chunked_log_probs(h, w, None, labels, 0.7),
        "logits": lambda h: log_prob_terms(F.linear(h, w).float() / 0.7, labels),
    }
    expected = results(h, lambda h: by_torch(F.linear(h, w).float() / 0.7, labels))
    for found, value, tolerance in zip(results(h, ways[way]), expected, (1e-5, 1e-5, 2e-2), strict=True):
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
