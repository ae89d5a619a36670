"""Module modes while a kit trains: adapters in training mode, the frozen base in eval mode, so it draws no dropout.

Activation checkpointing needs a trick. transformers checkpoints a block only while `block.training` is set, and a block
in training mode would draw its dropout. So the flag is set between the calls of a block and off within them, in the
forward and in the recomputation of the backward. It knows modes, and nothing of losses.
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
    """The named adapters are in training mode and the base in eval mode; afterwards everything is in eval mode."""
    kit.eval()
    for name in names:
        kit[name].train()
    with ExitStack() as exit_stack:
        exit_stack.callback(kit.eval)
        check_nf4_layout(kit.base)
        if activation_checkpointing:
            _enable_checkpointing(kit, exit_stack)
        yield


def _enable_checkpointing(kit: Kit, exit_stack: ExitStack) -> None:
    base: Any = kit.base
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    is_supported = getattr(base, "supports_gradient_checkpointing", False)  # transformers' own mark; timm has none
    if not is_supported or not blocks:
        raise ConfigError(
            f"train.activation_checkpointing: {type(base).__name__} does not support it; write "
            "train.activation_checkpointing=false and a smaller train.micro_batch_size"
        )
    kit.gradient_checkpointing_enable()
    exit_stack.callback(kit.gradient_checkpointing_disable)
    base.disable_input_require_grads()  # reentrant checkpointing wanted it, and left its hooks behind
    for block in blocks:
        _checkpoint_in_eval(block, exit_stack)


def _checkpoint_in_eval(block: Any, exit_stack: ExitStack) -> None:
    """Sets `block.training`, so that transformers checkpoints it, and clears it whenever the block's code runs."""
    checkpoint = block._gradient_checkpointing_func
    is_cleared = False

    def checkpoint_function(function: Callable[..., Any], *args: Any) -> Any:
        def function_in_eval(*inputs: Any) -> Any:  # called in the forward, and in the backward to recompute
            block.training = False
            try:
                return function(*inputs)
            finally:
                block.training = True

        return checkpoint(function_in_eval, *args)

    def clear_before(_block: nn.Module, _inputs: Any) -> None:
        """For calls without checkpointing: a kit runs prompts through the blocks before the text (prompt prefill)."""
        nonlocal is_cleared
        if block.training and not block.gradient_checkpointing:
            block.training, is_cleared = False, True

    def set_after(_block: nn.Module, _inputs: Any, _output: Any) -> None:
        """Only what was cleared for this call: during an evaluation a block stays in eval mode."""
        nonlocal is_cleared
        if is_cleared:
            block.training, is_cleared = True, False

    block.__dict__["_gradient_checkpointing_func"] = checkpoint_function
    block.training = True
    exit_stack.callback(block.register_forward_pre_hook(clear_before).remove)
    exit_stack.callback(block.register_forward_hook(set_after, always_call=True).remove)
