"""The output head of a language model, asked for the learnt positions alone.

Three ways, the first that holds on this model and its adapters: "one pass" (a frozen linear head and nothing after it),
"selected" (the head sees the learnt positions only), "whole" (all logits). What follows the head is found by putting
drawn numbers in its place; each way's loss is then compared with that of the whole logits on real rows. It knows the
head's place and no model, no data and no adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kitout.kit import Kit
from kitout.train.objectives.chunked_cross_entropy import one_pass, plain

Way = Literal["one pass", "selected", "whole"]
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the loss: the ways differ by rounding
DRAWN = 1000.0  # spread of the numbers put in the head's place: a cap or a scale after it shows


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
            ends = _still(kit, names, whole.head) and _last(call, whole.head)
            ways: list[Way] = ["one pass", "selected"] if ends else ["selected"]
            for way in ways:
                tried = cls(kit, way)
                try:
                    found = tried(call, places, labels, weights)[0].item()
                except (RuntimeError, ValueError, IndexError):  # more follows the head than this way allows for
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

    def logits(self, call: Any, places: Tensor) -> Tensor:
        """The logits at these positions, [N, V], where few are asked for."""
        if self.head is None or self.way == "whole":
            whole: Tensor = call().logits
            return whole.reshape(-1, whole.shape[-1])[places]
        with _choosing(self.head, places):
            chosen: Tensor = call().logits
        return chosen.reshape(len(places), -1)


def head_of(kit: Kit) -> nn.Linear | None:
    """The linear output head the model itself names, or None."""
    named = getattr(kit.base, "get_output_embeddings", None)  # the one name transformers gives it; timm has none
    head = named() if named is not None else None
    return head if isinstance(head, nn.Linear) else None


def _still(kit: Kit, names: list[str], head: nn.Module) -> bool:
    """Whether none of these adapters acts on the head, trains it or replaces a module that holds it."""
    path = next(path for path, module in kit.base.named_modules() if module is head)
    acts = any(path in kit[name].locals for name in names)
    replaced = [place.replace("/", ".") for name in names for place in kit[name].heads]
    return not acts and not any(path == place or path.startswith(f"{place}.") for place in replaced)


def _last(call: Any, head: nn.Linear) -> bool:
    """Whether what the head gives is what the model gives: drawn numbers in its place come out as they are."""
    drawn: list[Tensor] = []

    def forward(h: Tensor) -> Tensor:
        draw = torch.Generator(h.device).manual_seed(0)
        size = (*h.shape[:-1], head.out_features)
        drawn.append((DRAWN * torch.randn(size, generator=draw, device=h.device)).to(h.dtype))
        return drawn[-1]

    with _instead(head, forward):
        given = call().logits
    return len(drawn) == 1 and given.shape == drawn[0].shape and torch.equal(given.to(drawn[0].dtype), drawn[0])


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
        weight, bias = _values(head.weight), None if head.bias is None else _values(head.bias)
        found.append(one_pass(_flat(args, places), weight, bias, labels, weights))
        zeros = torch.zeros(1, 1, head.out_features, dtype=args[0].dtype, device=args[0].device)
        return zeros + (0.0 * found[-1][0]).to(zeros.dtype)

    with _instead(head, forward):
        yield found


@contextmanager
def _instead(head: nn.Module, forward: Any) -> Iterator[None]:
    """The head's forward, exchanged for the time of one call."""
    before = head.__dict__.get("forward")
    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before


def _values(parameter: Tensor) -> Tensor:
    """Plain numbers to multiply by; ValueError where they are stored in another way (quantised)."""
    value = parameter.data
    if type(value) is not Tensor or not value.is_floating_point() or value.dtype.itemsize < 2:
        raise ValueError(f"a head stored as {type(value).__name__} of {value.dtype}")
    return value
