"""The bare model under a kit, trained by mistake: one warning with the line to write; none where training is right."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import kitout
from interop.fixtures import ARGUMENTS, LabeledRows
from kitout import IA3, FullFineTuning, Kit, LoRA
from zoo import ZOO, out

MESSAGE = r"'a' gets gradients, .* have not moved.*Trainer\(model=kit\)"


def kit_of(species: str = "llama", method: Any = None) -> Kit:
    kit = kitout.attach(ZOO[species].build())
    kit.add("a", method or LoRA(rank=2), seed=1)
    kit.use("a")
    kit.base.train()
    return kit


def steps(call: Any, optimizer: torch.optim.Optimizer, species: str = "llama", number: int = 3, micro: int = 1) -> None:
    for _ in range(number):
        for _ in range(micro):
            out(call(**ZOO[species].batch(2, 0))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", [LoRA(rank=2), IA3(), FullFineTuning()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("species", ["llama", "bert", "vit"])
def test_an_optimizer_over_the_bare_model_is_warned_once(species: str, method: Any) -> None:
    kit = kit_of(species, method)
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        steps(kit.base, torch.optim.SGD(kit.base.parameters(), lr=0.1), species, number=6)
    assert len(caught) == 1


def test_trainer_of_the_bare_model_is_warned(tmp_path: Path) -> None:
    kit = kit_of()
    trainer = transformers.Trainer(
        model=kit.base, args=transformers.TrainingArguments(str(tmp_path), **ARGUMENTS, max_steps=3),
        train_dataset=LabeledRows(ZOO["llama"]),
    )  # fmt: skip
    with pytest.warns(UserWarning, match=MESSAGE):
        trainer.train()


def test_a_kit_called_under_an_optimizer_of_the_model_is_warned() -> None:
    kit = kit_of()
    with pytest.warns(UserWarning, match=MESSAGE):
        steps(kit, torch.optim.AdamW(kit.base.parameters()))


@pytest.mark.parametrize("call", ["kit", "base"])
@pytest.mark.parametrize("micro", [1, 4])
def test_right_training_is_not_warned(call: str, micro: int) -> None:
    """Whichever runs the forward: at a learning rate of 0, with accumulation, beside another optimizer."""
    kit = kit_of()
    head = nn.Linear(2, 2)
    others = torch.optim.SGD(head.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            others.step()
        steps(kit if call == "kit" else kit.base, torch.optim.SGD(kit.parameters(), lr=0.0), micro=micro)
    assert not kit.state.training_watch.is_open


def test_values_that_something_else_moves_are_not_warned() -> None:
    kit = kit_of()
    others = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            steps(kit, others, number=1)
            for parameter in kit.parameters():
                parameter.data.add_(0.1)


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen", "off"])
def test_what_does_not_train_is_not_watched(how: str) -> None:
    kit = kit_of()
    if how == "eval":
        kit.eval()
    elif how == "frozen":
        kit.train_only()
    elif how == "off":
        kit.use(None)
    with torch.set_grad_enabled(how != "no_grad"):
        kit(**ZOO["llama"].batch(2, 0))
    assert not kit.state.training_watch.is_open


def test_a_copy_is_watched_by_itself_and_two_kits_at_once() -> None:
    kit = kit_of()
    kit(**ZOO["llama"].batch(2, 0))
    other = copy.deepcopy(kit)
    with pytest.warns(UserWarning, match=MESSAGE):
        steps(other, torch.optim.SGD(other.base.parameters(), lr=0.1))
    assert not other.state.training_watch.is_open
    assert kit.state.training_watch.is_open
    steps(kit, torch.optim.SGD(kit.parameters(), lr=0.1), number=1)
    assert not kit.state.training_watch.is_open


def test_an_optimizer_of_something_else_is_no_reason_to_warn() -> None:
    """Gradients read for their own sake, while another model is trained in the same loop."""
    kit, other = kit_of(), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(4):
        out(kit(**ZOO["llama"].batch(2, 0))).square().mean().backward()
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
