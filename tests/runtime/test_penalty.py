"""The penalty of a Fusion joins every loss that a training forward gives, once per step; others add `kit.penalty()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interop.fixtures import ARGUMENTS, LabeledRows
from kitout import Composition, Fusion, Kit, LoRA, Stack
from laws.activate import kit_with
from zoo import ZOO

FACTOR = 0.5


def fused(species: str = "llama") -> tuple[Kit, dict[str, Tensor]]:
    kit, batch = kit_with(species, a=LoRA(rank=2), b=LoRA(rank=2), f=LoRA(rank=1))
    kit.remove("f")
    adapter = kit.add("f", Fusion(of=("a", "b"), penalty=FACTOR), seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    kit.use("f")
    kit.train()
    return kit, {**batch, "labels": batch["input_ids"]}


def loss_of(kit: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    output = kit(**batch, **options)
    loss: Tensor = output[0]
    return loss


def test_it_joins_the_loss_of_a_training_forward_alone() -> None:
    kit, batch = fused()
    penalty = kit.penalty()
    assert penalty is not None
    assert penalty > 1
    with torch.no_grad():
        bare = loss_of(kit, batch)
    for options in ({}, {"return_dict": False}):
        torch.testing.assert_close(loss_of(kit, batch, **options), bare + penalty)
    torch.testing.assert_close(loss_of(torch.compile(kit, backend="eager"), batch), bare + penalty)
    assert kit(input_ids=batch["input_ids"], return_dict=False)[0].ndim == 3
    kit.eval()
    torch.testing.assert_close(loss_of(kit, batch), bare)
    kit.train_only("a")
    kit.train()
    torch.testing.assert_close(loss_of(kit, batch), bare)
    kit.use("a")
    assert kit.penalty() is None


def test_it_is_that_of_what_is_active_by_its_share_of_the_rows() -> None:
    kit, _ = fused()
    whole = kit["f"].penalty()
    assert whole is not None
    kit.add("c", Composition(route=Stack("f", "a")))
    for route, share in ((["f", "a"], 0.5), (["f", "f"], 1.0), ("c", 1.0), (["f", "c"], 1.0), (Stack("a", "f"), 1.0)):
        kit.train_only("f", "a")
        with kit.use(route):
            penalty = kit.penalty()
        assert penalty is not None
        torch.testing.assert_close(penalty, whole * share)


class ByHand(transformers.Trainer):
    """A loss of logits, which kitout does not see."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **options: Any) -> Any:
        labels = inputs["labels"]
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        penalty = model.penalty()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return loss if penalty is None else loss + penalty


def moved(species: str, trainer: Any, factor: float, folder: Path, **settings: int) -> list[Tensor]:
    """What one step of plain descent changes."""
    kit, _ = fused(species)
    for site in kit["f"].sites:
        kit["f"].delta(site).penalty_factor = factor
    start = [p.detach().clone() for p in kit["f"].parameters()]
    arguments = {**ARGUMENTS, **settings, "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}
    args = transformers.TrainingArguments(str(folder), max_steps=1, **arguments)
    trainer(model=kit, args=args, train_dataset=LabeledRows(ZOO[species], 4)).train()
    return [p.detach() - q for p, q in zip(kit["f"].parameters(), start, strict=True)]


@pytest.mark.parametrize(
    ("species", "trainer", "steps"),
    [("llama", transformers.Trainer, 2), ("bert", transformers.Trainer, 2), ("bert", ByHand, 1)],
)
def test_a_trainer_adds_it_once_per_step(species: str, trainer: Any, steps: int, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
    value, bare = (moved(species, trainer, factor, tmp_path, **settings) for factor in (FACTOR, 0.0))
    kit, _ = fused(species)
    penalty = kit.penalty()
    assert penalty is not None
    gradients = torch.autograd.grad(penalty, list(kit["f"].parameters()), allow_unused=True)
    for changed, without, gradient in zip(value, bare, gradients, strict=True):
        expected = torch.zeros_like(changed) if gradient is None else -0.01 * gradient
        torch.testing.assert_close(changed - without, expected, atol=1e-6, rtol=1e-4)
