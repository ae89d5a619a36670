"""The bare model as the kit found it: its forward's signature, and what attach changes and detach puts back.

It knows a model's parameters and modes, and nothing of adapters or routes.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from kitout.kit.kit import Kit


class Forward:
    """`kit.forward`: the base's call with the base's signature (transformers.Trainer reads it to choose columns)."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self.__signature__ = inspect.signature(kit.base.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._kit.base(*args, **kwargs)


class BareState:
    """What attach changes and detach puts back: each parameter's requires_grad and each module's mode."""

    def __init__(self, grad: dict[str, bool], mode: dict[str, bool]) -> None:
        self.grad, self.mode = grad, mode

    @classmethod
    def take(cls, base: nn.Module) -> BareState:
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


def train_base(kit: Kit, mode: bool) -> None:
    """Training mode of the base, or none where all that is trained wants it still (no dropout, no drop-path)."""
    adapters = [kit[name] for name in kit.names]
    trained = [a.method for a in adapters if any(p.requires_grad for p in a.parameters())]
    still = bool(trained) and all(method.still for method in trained)
    type(kit.base).__dict__.get("frozen_train", nn.Module.train)(kit.base, mode and not still)
    for module in kit.base.modules():
        if still and getattr(module, "gradient_checkpointing", False):
            module.training = mode  # else its activations would not be recomputed; its parts stay still


def keep_still(kit: Kit) -> None:
    """The base's mode after what is trained has changed; left as it is where no method minds."""
    if kit.training and any(kit[name].method.still for name in kit.names):
        train_base(kit, True)
