"""Just enough of a trainer, an accelerator and a model for TRL's own loss methods to run on given tensors.

The methods are called unbound: what they compute is TRL's code, and nothing here repeats a formula of it.
"""

from __future__ import annotations

import importlib
import types
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def trainer_class(name: str, module: str = "trl") -> Any:
    """TRL's trainer; the test is skipped where there is no TRL (before Python 3.11)."""
    pytest.importorskip("trl")
    return getattr(importlib.import_module(module), name)


class Accelerator:
    """One process."""

    device = torch.device("cpu")
    num_processes, process_index, is_main_process, sync_gradients = 1, 0, True, True

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


class TokenTable(nn.Module):
    """A model whose log-probabilities are a table [rows, T - 1]: a row of input ids names its row of the table."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> Any:
        mask = labels[:, 1:] != -100
        log_probs = self.log_probs[input_ids[:, 0], : mask.shape[1]] * mask
        zeros = torch.zeros_like(log_probs)
        return types.SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=mask)


class GivenOutput(nn.Module):
    """A model whose logits are given, whatever it is called with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.given = logits

    def forward(self, *_: Any, **__: Any) -> Any:
        return types.SimpleNamespace(logits=self.given)


def stand_in(trainer: type, methods: tuple[str, ...] = (), **attributes: Any) -> Any:
    """An object with these attributes, and these methods of the trainer bound to it."""
    arguments = types.SimpleNamespace(**attributes.pop("args", {}))
    me = types.SimpleNamespace(
        accelerator=Accelerator(),
        args=arguments,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )
    for name in methods:
        setattr(me, name, types.MethodType(getattr(trainer, name), me))
    return me


def logged(me: Any) -> dict[str, float]:
    """What the method wrote as metrics."""
    return {name: values[-1] for name, values in me._metrics["train"].items()}


def pad_rows(values: Tensor, lengths: list[int], width: int | None = None, value: float = 0.0) -> Tensor:
    """Flat [N] -> [rows, width], on the right, with its gradient."""
    width = max(lengths) if width is None else width
    return torch.stack([nn.functional.pad(row, (0, width - len(row)), value=value) for row in values.split(lengths)])


def owners_of(lengths: list[int]) -> Tensor:
    """The row of each token."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def check_close(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    """Absolute and relative."""
    torch.testing.assert_close(
        torch.as_tensor(ours, dtype=torch.float64),
        torch.as_tensor(theirs, dtype=torch.float64),
        atol=tolerance,
        rtol=tolerance,
    )
