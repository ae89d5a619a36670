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

ITS_MARK = "support_avx512bf16_for_cpu"  # on bitsandbytes' 4-bit linears


@contextmanager
def at_work(kit: Kit, names: Sequence[str], checkpointing: bool) -> Iterator[None]:
    """While it lasts the named adapters are in training mode and the base is not; then all is eval."""
    kit.eval()
    for name in names:
        kit[name].train()
    with ExitStack() as undone:
        undone.callback(kit.eval)
        _check_layout(kit)
        if checkpointing:
            _checkpoint(kit, undone)
        yield


def as_quantised(model: nn.Module) -> nn.Module:
    """Keeps 4-bit weights as bitsandbytes quantised them; to be called once, before the model runs (and is attached).

    On CPUs with AVX512-BF16 it lays them out anew, in place, when they are first used in eval mode: a form that has no
    gradients, says nothing of it, and rounds the scales.
    """
    for module in model.modules():
        if getattr(module, ITS_MARK, False):
            setattr(module, ITS_MARK, False)
    return model


def _check_layout(kit: Kit) -> None:
    for path, module in kit.base.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigError(
                f"{path}: bitsandbytes has laid this 4-bit weight out for inference, where it has no gradient: load "
                "the model afresh and call kitout.train.loop.base_mode.as_quantised(model) before kitout.attach(model)"
            )


def _checkpoint(kit: Kit, undone: ExitStack) -> None:
    base: Any = kit.base
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    can = getattr(base, "supports_gradient_checkpointing", False)  # transformers' own mark; timm has none
    if not can or not blocks:
        raise ConfigError(
            f"train.checkpointing: {type(base).__name__} has no blocks whose activations can be computed again; "
            "write train.checkpointing=false and a smaller train.micro_batch"
        )
    kit.gradient_checkpointing_enable()
    undone.callback(kit.gradient_checkpointing_disable)
    base.disable_input_require_grads()  # the older kind of checkpointing wanted it, and left its hooks behind
    for block in blocks:
        block.__dict__["_gradient_checkpointing_func"] = _unmoved(block, block._gradient_checkpointing_func)
        block.training = True
        undone.callback(block.register_forward_pre_hook(_calmed).remove)
        undone.callback(block.register_forward_hook(_stirred, always_call=True).remove)


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


def _calmed(block: Any, _inputs: Any) -> None:
    """A kit runs prompts through blocks ahead of their text, without checkpointing."""
    if block.training and not block.gradient_checkpointing:
        block.training = False
        block.__dict__["_kitout_calmed"] = True


def _stirred(block: Any, _inputs: Any, _output: Any) -> None:
    """Only what was calmed for one call: a block at rest, as in a measurement, stays at rest."""
    if block.__dict__.pop("_kitout_calmed", False):
        block.training = True
