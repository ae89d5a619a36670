"""A head: a module of the model that another one replaces while its adapter is active (classifier, value head).

It is a Delta of its own kind: it replaces the module's product instead of adding to it. It knows its module, and
nothing of adapters or of where it stands in a model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kitout.delta import Delta
from kitout.errors import NotMergeable

BLENDED = (
    "a head in part (a strength, a Mix, an adapter after it) is a blend of two modules, which only plain linears of "
    "one shape can hold"
)


class Head(Delta):
    """A module that stands in for one of the model's own."""

    replaces_module = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, y: Tensor, frozen: Any = None) -> Tensor:
        own_dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), x.dtype)
        new: Tensor = self.module(x.to(own_dtype))  # fp32 values over a half-precision base, the base's dtype outside
        return new.to(x.dtype)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """For a blend with the module it replaces; a whole head takes that module's place."""
        head = self.module
        if type(head) is not nn.Linear or head.weight.shape != w.shape:
            raise NotMergeable(BLENDED)
        bias = None if head.bias is None else head.bias.to(w.dtype)
        return head.weight.to(w.dtype), torch.zeros_like(b) if bias is None and b is not None else bias
