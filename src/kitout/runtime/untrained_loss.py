"""A training loss that reaches no adapter, said where it matters: in its backward pass.

torch's own error there names no adapter ("element 0 of tensors does not require grad"). A forward alone may be meant,
to evaluate in training mode, so it is never refused: the loss has its value, and a backward pass through it says what
to write. It knows no trainer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kitout.errors import RouteError
from kitout.route import adapter_names
from kitout.runtime.state import KitState


def explain_backward(state: KitState, output: Any) -> Any:
    """The output of a kit's forward; in training, a loss without a gradient for lack of an adapter has that error."""
    if not state.modules.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return output
    loss = output.get("loss") if isinstance(output, dict) else None
    if not isinstance(loss, Tensor) or loss.requires_grad:
        return output
    problem = _why_nothing_is_trained(state)
    if problem:
        output["loss"] = _Refusal.apply(loss, torch.zeros((), requires_grad=True), problem)
    return output


def _why_nothing_is_trained(state: KitState) -> str:
    """Empty where an adapter is active that requires a gradient."""
    if not state.names:
        return "this kit has no adapter: kit.add('name', LoRA(rank=8)) and kit.use('name') before training"
    active = state.names_with_parts(adapter_names(state.route))
    if not active:
        return (
            f"no adapter is active, so this loss reaches none of {', '.join(map(repr, state.names))}: "
            f"kit.use({state.names[0]!r}) before training"
        )
    if any(value.requires_grad for name in active for value in state[name].parameters()):
        return ""
    names = ", ".join(map(repr, active))
    return f"of the active adapters ({names}) no value requires a gradient: kit.train_only({names}) before training"


class _Refusal(torch.autograd.Function):
    """The same value; its backward pass raises."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, anchor: Tensor, problem: str) -> Tensor:  # noqa: ARG004
        ctx.problem = problem
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: ARG004
        raise RouteError(f"{ctx.problem}; if its gradient is not wanted, loss.detach()")
