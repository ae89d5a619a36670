"""Linears that are called one after the other with the same tensor, computed by the first call as one autograd node.

Which do, the probe has seen. Each call still proves it: the others take what the first has left for them only where
they are called with that very tensor, unwritten since; else they compute their own. So nothing depends on what was
seen but speed. It knows nothing of what a Delta computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Linear = tuple[Tensor, Tensor | None]  # weight, bias
FusedLinears = Callable[[Tensor, Sequence[Linear]], list[Tensor] | None]


class SharedInput:
    """Frozen linears in the order they are called. fused_linears: their outputs with their Deltas, if it can."""

    def __init__(self, modules: Sequence[nn.Module], fused_linears: FusedLinears) -> None:
        self.modules, self.fused_linears = tuple(modules), fused_linears
        self.x: Tensor | None = None
        self.version = 0
        self.ready: dict[int, Tensor] = {}  # by number of the linear: what the first call has left for it

    def output(self, number: int, x: Tensor) -> Tensor | None:
        """The output of one of them, called with x; None where it is to compute that itself."""
        if number > 0:
            if self.x is not x or self.version != x._version or not torch.is_grad_enabled():
                return None
            y = self.ready.pop(number, None)
            if not self.ready:
                self.x = None
            return y
        self.x, self.ready = None, {}
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        linears = [frozen_linear(module, x) for module in self.modules]
        if None in linears or any(m._forward_pre_hooks or "forward" in m.__dict__ for m in self.modules[1:]):
            return None  # one of them has its weights, or its input, only from its own call on
        ys = self.fused_linears(x, [linear for linear in linears if linear is not None])
        if ys is None:
            return None
        self.x, self.version, self.ready = x, x._version, dict(enumerate(ys[1:], 1))
        return ys[0]

    def __getstate__(self) -> dict[str, object]:  # a forward's graph is not copied
        return self.__dict__ | {"x": None, "ready": {}}


def frozen_linear(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a plain frozen linear; None where it has them in another form.

    A sharded or quantized weight is of a class of its own; a parametrized one is no parameter. Where the caller trains
    one of them beside the adapters, it is not frozen.
    """
    own = module._parameters
    w = own.get("weight")
    if type(w) is not nn.Parameter or w.requires_grad or "bias" not in own or w.device != x.device:
        return None
    b = own["bias"]
    return None if b is not None and b.requires_grad else (w, b)
