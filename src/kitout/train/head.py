"""The output head of a language model, asked for the learnt positions alone.

Three ways, the first that holds on this model and adapter, tried once on real rows against the whole logits: "one pass"
(a frozen linear head and nothing after it), "selected" (the head sees the learnt positions only), "whole" (all logits).
It knows the head's place and no model, no data and no adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kitout.kit.kit import Kit
from kitout.train.onepass import one_pass, plain

Way = Literal["one pass", "selected", "whole"]
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the loss: the ways differ by rounding


class HeadLoss:
    """`loss(call, places, labels, weights)`: the model is called once and its loss is taken at these positions."""

    def __init__(self, kit: Kit, way: Way) -> None:
        self.way, self.head = way, head_of(kit)

    @classmethod
    def tried(cls, kit: Kit, names: list[str], call: Any, places: Tensor, labels: Tensor) -> HeadLoss:
        """The first way whose loss is that of the whole logits. call() runs the model and returns its output."""
        whole = cls(kit, "whole")
        if whole.head is None:
            return whole
        weights = torch.full((len(labels),), 1.0 / len(labels), device=labels.device)
        with torch.no_grad():
            true = whole(call, places, labels, weights)[0].item()
            ways: list[Way] = ["one pass", "selected"] if _frozen(kit, names, whole.head) else ["selected"]
            for way in ways:
                tried = cls(kit, way)
                try:
                    found = tried(call, places, labels, weights)[0].item()
                except (RuntimeError, ValueError):  # more follows the head than this way allows for
                    continue
                if abs(found - true) <= CLOSE.get(kit.dtype, 1e-4) * (1 + abs(true)):
                    return tried
        return whole

    def __call__(self, call: Any, places: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """places [N]: of the predicting positions in the flattened [B * T]; labels, weights [N].

        The weighted sum with its gradient, each position's loss [N], whether its label was the likeliest [N].
        """
        if self.head is None or self.way == "whole":
            logits = call().logits
            return plain(logits.reshape(-1, logits.shape[-1])[places], labels, weights)
        if self.way == "selected":
            with _choosing(self.head, places):
                return plain(call().logits.reshape(len(places), -1), labels, weights)
        with _ending(self.head, places, labels, weights) as found:
            call()
        return found[0]


def head_of(kit: Kit) -> nn.Linear | None:
    """The linear output head the model itself names, or None."""
    named = getattr(kit.base, "get_output_embeddings", None)  # the one name transformers gives it; timm has none
    head = named() if named is not None else None
    return head if isinstance(head, nn.Linear) else None


def _frozen(kit: Kit, names: list[str], head: nn.Module) -> bool:
    """Whether none of these adapters acts on the head or trains it."""
    path = next(path for path, module in kit.base.named_modules() if module is head)
    return not any(path in kit[name].locals or path in kit[name].heads for name in names)


def _flat(args: tuple[Any, ...], places: Tensor) -> Tensor:
    h: Tensor = args[0]
    return h.reshape(-1, h.shape[-1])[places]


@contextmanager
def _choosing(head: nn.Module, places: Tensor) -> Iterator[None]:
    """The head is given the chosen positions alone, as one row: [1, N, d]."""
    handle = head.register_forward_pre_hook(lambda _module, args: (_flat(args, places)[None], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _ending(
    head: nn.Linear, places: Tensor, labels: Tensor, weights: Tensor
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """The head takes the loss itself, where its weight is whole even if it is sharded, and passes on zeros.

    The zeros hang on the loss, so that who follows the graph from the output (DistributedDataParallel) sees
    what is used.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(*args: Tensor) -> Tensor:
        found.append(one_pass(_flat(args, places), head.weight.detach(), _values(head.bias), labels, weights))
        return (0.0 * found[-1][0]).to(args[0].dtype).expand(1, 1, head.out_features)

    before = head.__dict__.get("forward")
    head.__dict__["forward"] = forward
    try:
        yield found
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before


def _values(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
