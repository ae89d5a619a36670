"""The mode a kit works in while it learns: the frozen base still (no dropout), what is trained at work.

Where activations are computed again in backward, transformers asks blocks for training mode; ours are asked so and run
without it, so that neither their parts nor they themselves draw a dropout of the base. It knows modes, and nothing of
losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kitout.errors import ConfigError
from kitout.kit import Kit
from kitout.train.setup.quantization import check_nf4_layout


@contextmanager
def training_mode(kit: Kit, names: Sequence[str], activation_checkpointing: bool) -> Iterator[None]:
    """While it lasts the named adapters are in training mode and the base is not; then all is eval."""
    kit.eval()
    for name in names:
        kit[name].train()
    with ExitStack() as undone:
        undone.callback(kit.eval)
        check_nf4_layout(kit.base)
        if activation_checkpointing:
            _enable_checkpointing(kit, undone)
        yield


def _enable_checkpointing(kit: Kit, exit_stack: ExitStack) -> None:
    base: Any = kit.base
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    can = getattr(base, "supports_gradient_checkpointing", False)  # transformers' own mark; timm has none
    if not can or not blocks:
        raise ConfigError(
            f"train.activation_checkpointing: {type(base).__name__} has no blocks whose activations can be "
            "computed again; "
            "write train.activation_checkpointing=false and a smaller train.micro_batch_size"
        )
    kit.gradient_checkpointing_enable()
    exit_stack.callback(kit.gradient_checkpointing_disable)
    base.disable_input_require_grads()  # the older kind of checkpointing wanted it, and left its hooks behind
    for block in blocks:
        block.__dict__["_gradient_checkpointing_func"] = _checkpoint_in_eval(block, block._gradient_checkpointing_func)
        block.training = True
        exit_stack.callback(block.register_forward_pre_hook(_eval_before).remove)
        exit_stack.callback(block.register_forward_hook(_train_after, always_call=True).remove)


def _checkpoint_in_eval(block: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
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


def _eval_before(block: Any, _inputs: Any) -> None:
    """A kit runs prompts through blocks ahead of their text, without checkpointing."""
    if block.training and not block.gradient_checkpointing:
        block.training = False
        block.__dict__["_kitout_in_eval"] = True


def _train_after(block: Any, _inputs: Any, _output: Any) -> None:
    """Only what was calmed for one call: a block at rest, as in a measurement, stays at rest."""
    if block.__dict__.pop("_kitout_in_eval", False):
        block.training = True
