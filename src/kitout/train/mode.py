"""The mode a kit works in while it learns: the frozen base still (no dropout), what is trained at work.

Where activations are computed again in backward, transformers asks blocks for training mode; ours are asked so and run
without it, so that neither their parts nor they themselves draw a dropout of the base. It knows modes, and nothing of
losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kitout.errors import ConfigError
from kitout.kit.kit import Kit


@contextmanager
def at_work(kit: Kit, names: Sequence[str], checkpointing: bool) -> Iterator[None]:
    """While it lasts the named adapters are in training mode and the base is not; then all is eval."""
    kit.eval()
    for name in names:
        kit[name].train()
    try:
        if checkpointing:
            _checkpoint(kit)
        yield
    finally:
        if checkpointing and _can(kit):
            kit.gradient_checkpointing_disable()
        kit.eval()


@contextmanager
def at_rest(kit: Kit) -> Iterator[None]:
    """While it lasts nothing is in training mode, as in every measurement; then all is as before."""
    before = [(module, module.training) for whole in (kit.base, kit) for module in whole.modules() if module.training]
    kit.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _can(kit: Kit) -> bool:
    return bool(getattr(kit.base, "supports_gradient_checkpointing", False))  # transformers' own mark; timm has none


def _checkpoint(kit: Kit) -> None:
    blocks = [module for module in kit.base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not _can(kit) or not blocks:
        raise ConfigError(
            f"train.checkpointing: {type(kit.base).__name__} has no blocks whose activations can be computed again; "
            "write train.checkpointing=false and a smaller train.micro_batch"
        )
    kit.gradient_checkpointing_enable()
    base: Any = kit.base
    base.disable_input_require_grads()  # the older kind of checkpointing wanted it, and left its hooks behind
    for block in blocks:
        block.__dict__["_gradient_checkpointing_func"] = _unmoved(block, block._gradient_checkpointing_func)
        block.training = True


def _unmoved(block: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Checkpointing of a block that is in training mode only to be asked for it, the second time too."""

    def around(function: Callable[..., Any], *args: Any) -> Any:
        def still(*inputs: Any) -> Any:
            block.training = False
            try:
                return function(*inputs)
            finally:
                block.training = True

        return checkpoint(still, *args)

    return around
