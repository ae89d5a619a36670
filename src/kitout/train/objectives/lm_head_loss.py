"""The output head of a language model, asked for the learnt positions alone.

Three ways, the first that holds on this model and its adapters: "chunked" (a frozen linear head and nothing after it),
"selected" (the head sees the learnt positions only), "full" (all logits). What follows the head is found by putting
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
from kitout.train.objectives.chunked_cross_entropy import chunked_cross_entropy, cross_entropy_terms

HeadLossMode = Literal["chunked", "selected", "full"]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the loss: the ways differ by rounding
PROBE_SPREAD = 1000.0  # spread of the numbers put in the head's place: a cap or a scale after it shows


class HeadLoss:
    """`loss(call, places, labels, weights)`: the model is called once and its loss is taken at these positions."""

    def __init__(self, kit: Kit, mode: HeadLossMode) -> None:
        self.mode, self.head = mode, output_head(kit)

    @classmethod
    def choose(cls, kit: Kit, names: list[str], run_model: Any, positions: Tensor, labels: Tensor) -> HeadLoss:
        """The first way whose loss is that of the whole logits. call() runs the model and returns its output."""
        whole = cls(kit, "full")
        if whole.head is None:
            return whole
        weights = torch.full((len(labels),), 1.0 / len(labels), device=labels.device)
        with torch.no_grad():
            true = whole(run_model, positions, labels, weights)[0].item()
            ends = _head_is_frozen(kit, names, whole.head) and _nothing_after_head(run_model, whole.head)
            ways: list[HeadLossMode] = ["chunked", "selected"] if ends else ["selected"]
            for way in ways:
                tried = cls(kit, way)
                try:
                    found = tried(run_model, positions, labels, weights)[0].item()
                except (RuntimeError, ValueError, IndexError):  # more follows the head than this way allows for
                    continue
                if abs(found - true) <= TOLERANCE.get(kit.dtype, 1e-4) * (1 + abs(true)):
                    return tried
        return whole

    def __call__(
        self, run_model: Any, positions: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """places [N]: of the predicting positions in the flattened [B * T]; labels, weights [N].

        The weighted sum with its gradient, each position's loss [N], whether its label was the likeliest [N].
        """
        if self.head is None or self.mode == "full":
            logits = run_model().logits
            return cross_entropy_terms(logits.reshape(-1, logits.shape[-1])[positions], labels, weights)
        if self.mode == "selected":
            with _select_positions(self.head, positions):
                return cross_entropy_terms(run_model().logits.reshape(len(positions), -1), labels, weights)
        with _loss_in_head(self.head, positions, labels, weights) as found:
            run_model()
        return found[0]

    def logits(self, run_model: Any, positions: Tensor) -> Tensor:
        """The logits at these positions, [N, V], where few are asked for."""
        if self.head is None or self.mode == "full":
            whole: Tensor = run_model().logits
            return whole.reshape(-1, whole.shape[-1])[positions]
        with _select_positions(self.head, positions):
            chosen: Tensor = run_model().logits
        return chosen.reshape(len(positions), -1)


def output_head(kit: Kit) -> nn.Linear | None:
    """The linear output head the model itself names, or None."""
    named = getattr(kit.base, "get_output_embeddings", None)  # the one name transformers gives it; timm has none
    head = named() if named is not None else None
    return head if isinstance(head, nn.Linear) else None


def _head_is_frozen(kit: Kit, names: list[str], head: nn.Module) -> bool:
    """Whether none of these adapters acts on the head, trains it or replaces a module that holds it."""
    path = next(path for path, module in kit.base.named_modules() if module is head)
    acts = any(path in kit[name].by_module for name in names)
    replaced = [place.replace("/", ".") for name in names for place in kit[name].heads]
    return not acts and not any(path == place or path.startswith(f"{place}.") for place in replaced)


def _nothing_after_head(run_model: Any, head: nn.Linear) -> bool:
    """Whether what the head gives is what the model gives: drawn numbers in its place come out as they are."""
    drawn: list[Tensor] = []

    def forward(h: Tensor) -> Tensor:
        draw = torch.Generator(h.device).manual_seed(0)
        size = (*h.shape[:-1], head.out_features)
        drawn.append((PROBE_SPREAD * torch.randn(size, generator=draw, device=h.device)).to(h.dtype))
        return drawn[-1]

    with _replaced_forward(head, forward):
        given = run_model().logits
    return len(drawn) == 1 and given.shape == drawn[0].shape and torch.equal(given.to(drawn[0].dtype), drawn[0])


def _hidden_at(args: tuple[Any, ...], positions: Tensor) -> Tensor:
    h: Tensor = args[0]
    return h.reshape(-1, h.shape[-1])[positions]


@contextmanager
def _select_positions(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """The head is given the chosen positions alone, as one row: [1, N, d]."""
    handle = head.register_forward_pre_hook(lambda _module, args: (_hidden_at(args, positions)[None], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _loss_in_head(
    head: nn.Linear, positions: Tensor, labels: Tensor, weights: Tensor
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """The head takes the loss itself, where its weight is whole even if it is sharded, and passes on zeros.

    The zeros hang on the loss, so that who follows the graph from the output (DistributedDataParallel) sees
    what is used.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(*args: Tensor) -> Tensor:
        weight, bias = _plain_weight(head.weight), None if head.bias is None else _plain_weight(head.bias)
        found.append(chunked_cross_entropy(_hidden_at(args, positions), weight, bias, labels, weights))
        zeros = torch.zeros(1, 1, head.out_features, dtype=args[0].dtype, device=args[0].device)
        return zeros + (0.0 * found[-1][0]).to(zeros.dtype)

    with _replaced_forward(head, forward):
        yield found


@contextmanager
def _replaced_forward(head: nn.Module, forward: Any) -> Iterator[None]:
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


def _plain_weight(weight: Tensor) -> Tensor:
    """Plain numbers to multiply by; ValueError where they are stored in another way (quantised)."""
    value = weight.data
    if type(value) is not Tensor or not value.is_floating_point() or value.dtype.itemsize < 2:
        raise ValueError(f"a head stored as {type(value).__name__} of {value.dtype}")
    return value
