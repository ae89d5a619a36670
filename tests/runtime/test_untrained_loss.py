"""A loss that reaches no adapter says so in its backward pass, and is an ordinary value everywhere else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kitout
from interop.fixtures import ARGUMENTS, LabeledRows
from kitout import Kit, LoRA
from kitout.errors import RouteError
from zoo import ZOO


def kit_of(*names: str) -> Kit:
    kit = kitout.attach(ZOO["llama"].build())
    for name in names:
        kit.add(name, LoRA(rank=2), seed=1)
    kit.train()
    return kit


def loss_of(kit: Any) -> torch.Tensor:
    rows = ZOO["llama"].batch(2, 0)
    loss: torch.Tensor = kit(**rows, labels=rows["input_ids"]).loss
    return loss


def freeze(kit: Kit) -> None:
    kit.use("a")
    kit.train_only()


CASES: list[tuple[tuple[str, ...], Callable[[Kit], object], str]] = [
    ((), lambda _: None, "has no adapter: kit.add("),
    (("a", "b"), lambda _: None, "no adapter is active, so this loss reaches none of 'a', 'b': kit.use('a')"),
    (("a",), freeze, "('a') no value requires a gradient: kit.train_only('a')"),
]


@pytest.mark.parametrize(("names", "prepare", "message"), CASES, ids=["no adapter", "none active", "none trainable"])
def test_backward_says_what_to_write(names: tuple[str, ...], prepare: Callable[[Kit], object], message: str) -> None:
    kit = kit_of(*names)
    prepare(kit)
    loss = loss_of(kit)
    with pytest.raises(RouteError, match=re.escape(message)):
        loss.backward()
    with pytest.raises(RouteError, match=re.escape(message)):
        (loss / 4).backward()
    kit.eval()
    assert torch.equal(loss_of(kit), loss)  # the tiny model has no dropout
    assert not loss_of(kit).requires_grad


def test_trainer_says_it(tmp_path: Path) -> None:
    trainer = transformers.Trainer(
        model=kit_of("a"), args=transformers.TrainingArguments(str(tmp_path), **ARGUMENTS, max_steps=1),
        train_dataset=LabeledRows(ZOO["llama"]), eval_dataset=LabeledRows(ZOO["llama"]),
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(RouteError, match=r"kit\.use\('a'\) before training"):
        trainer.train()


def test_what_is_trained_or_meant_is_left_alone() -> None:
    kit = kit_of("a")
    with torch.no_grad():
        assert not loss_of(kit).requires_grad
    assert not loss_of(kit.base).requires_grad  # the model itself, frozen
    (loss_of(kit).detach() + torch.ones((), requires_grad=True)).backward()
    with kit.use("a"):
        loss_of(kit).backward()
    assert any(value.grad is not None for value in kit["a"].parameters())
    torch.optim.SGD(kit["a"].parameters(), lr=0.1).step()  # held: else the watch of the next tests still asks for it
    embeddings = kit.get_input_embeddings()(ZOO["llama"].batch(2, 0)["input_ids"]).requires_grad_()
    kit(inputs_embeds=embeddings, labels=ZOO["llama"].batch(2, 0)["input_ids"]).loss.backward()
    assert embeddings.grad is not None
