"""Likelihoods of ten times as many examples hold no more tensors at once: a batch's logits, and plain numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kitout
from kitout import LoRA
from kitout.evaluate.ask.choices import ChoiceQuestion, choice_likelihoods
from kitout.evaluate.ask.text_likelihood import text_likelihoods
from kitout.evaluate.ask.token_likelihood import ScoredLogits
from kitout.train.measure.predict import predict
from kitout.train.objectives.tasks import TASKS, ObjectiveSettings
from train.fixtures import texts as encoded_texts
from zoo import ZOO, tokenizer_of


class HeldBytes(TorchDispatchMode):
    """The most bytes that tensors made within it hold at once; views count with what they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[int, int]] = {}  # by address: bytes, tensors that hold them
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not address:
            return
        number = self.held.get(address, (size, 0))[1]
        self.held[address] = size, number + 1
        self.now += 0 if number else size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self.free, address)

    def free(self, address: int) -> None:
        size, number = self.held[address]
        self.held[address] = size, number - 1
        if number == 1:
            del self.held[address]
            self.now -= size


def peak_of(call: Callable[[], object]) -> int:
    with torch.no_grad(), HeldBytes() as mode:
        call()
    return mode.peak


def asks(number: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    kit = kitout.attach(ZOO["llama"].build()).eval()
    kit.add("a", LoRA(rank=2), seed=0)
    tokenizer = tokenizer_of(ZOO["llama"])
    texts = [f"it rained on day {i % 97} of {i % 13}" for i in range(number)]
    questions = [ChoiceQuestion(text, (f"day {i % 7}", "no", "it rained"), i % 3) for i, text in enumerate(texts)]
    items = encoded_texts(number)
    objective = TASKS["causal_lm"].build_objective(kit, ObjectiveSettings(0))
    return {
        "texts": lambda: text_likelihoods(kit, tokenizer, texts, [None, "a"], divergence=True),
        "choices": lambda: choice_likelihoods(kit, tokenizer, questions, [None, "a"]),
        "examples": lambda: predict(kit, objective, items),
    }


@pytest.mark.parametrize("kind", ["texts", pytest.param("choices", marks=pytest.mark.slow), "examples"])
def test_ten_times_as_many_examples_hold_no_more(kind: str) -> None:
    few, many = (peak_of(asks(number)[kind]) for number in (200, 2000))
    assert few > 0
    assert many <= 1.15 * few


def test_the_measure_sees_logits_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    log_probs = ScoredLogits.log_probs

    def keep(self: ScoredLogits) -> Tensor:
        kept.append(self.logits)
        return log_probs(self)

    monkeypatch.setattr(ScoredLogits, "log_probs", keep)
    few = peak_of(asks(200)["texts"])
    kept.clear()
    assert peak_of(asks(800)["texts"]) > 2 * few
