"""The base before attach: its forward's signature, and what attach changes and detach restores.

It knows a model's parameters and modes, and nothing of adapters or routes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


class KitForward:
    """`kit.forward`: the base's call with the base's signature (transformers.Trainer reads it to choose columns)."""

    def __init__(self, base: nn.Module, finish: Callable[[Any, Mapping[str, Any]], Any]) -> None:
        self._base, self._finish = base, finish  # what is done with the output, by the keyword arguments
        self.__signature__ = inspect.signature(base.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._finish(self._base(*args, **kwargs), kwargs)


class BaseState:
    """What attach changes and detach puts back: each parameter's requires_grad and each module's mode."""

    def __init__(self, grad: dict[str, bool], mode: dict[str, bool]) -> None:
        self.grad, self.mode = grad, mode

    @classmethod
    def capture(cls, base: nn.Module) -> BaseState:
        return cls(
            {n: p.requires_grad for n, p in base.named_parameters()}, {n: m.training for n, m in base.named_modules()}
        )

    def restore(self, base: nn.Module) -> None:
        for n, p in base.named_parameters():
            p.requires_grad_(self.grad.get(n, p.requires_grad))
        for n, m in base.named_modules():
            m.training = self.mode.get(n, m.training)


def enable_checkpointing(base: Any, *args: Any, **kwargs: Any) -> None:
    """Activation checkpointing by the name the base knows: transformers has renamed it, and its keywords, in 5.23."""
    enable = getattr(base, "activation_checkpointing_enable", None)
    if enable is None:
        base.gradient_checkpointing_enable(*args, **kwargs)
    else:
        enable(*args, **{k.replace("gradient_", "activation_"): v for k, v in kwargs.items()})


def disable_checkpointing(base: Any) -> None:
    (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()
