"""A head: a module of the model that another one replaces while its adapter is active (classifier, value head).

It is a Delta of its own kind: it replaces the module's product instead of adding to it. It knows its module, and
nothing of adapters or of where it stands in a model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.weights import FrozenModule, floating_dtype
from kitout.delta import Delta
from kitout.errors import NotMergeable
from kitout.runtime.hooks.class_swap import original_class

BLENDED = (
    "a head in part (a strength, a Mix, an adapter after it) is a blend of two modules, which only plain linears of "
    "one shape can hold"
)


class Head(Delta):
    """A module that stands in for one of the model's own."""

    replaces_module = True
    reads_weight = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Any:
        """The module on x, as the module takes it (token ids stay integers); y is not read.

        Its values may be fp32 over a half-precision base: the output has the dtype of the module it replaces. A module
        of the same class as that one gets all arguments of its call.
        """
        assert frozen is not None
        replaced = frozen.site.module
        same_class = original_class(replaced) is original_class(self.module)
        args, kwargs = (frozen.call_args[1:], frozen.call_kwargs) if same_class and frozen.call_args else ((), {})
        if not x.is_floating_point():
            new: Any = self.module(x, *args, **kwargs)
            return new.to(floating_dtype(replaced, new.dtype))
        new = self.module(x.to(floating_dtype(self.module, x.dtype)), *args, **kwargs)
        return new.to(x.dtype) if isinstance(new, Tensor) else new

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """For a blend with the module it replaces; a whole head takes that module's place."""
        head = self.module
        if type(head) is not nn.Linear or head.weight.shape != w.shape:
            raise NotMergeable(BLENDED)
        bias = None if head.bias is None else head.bias.to(w.dtype)
        return head.weight.to(w.dtype), torch.zeros_like(b) if bias is None and b is not None else bias
