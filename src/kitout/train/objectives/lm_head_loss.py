"""The loss or log-probabilities of a language model, with its output head run at the target positions alone.

There are three modes; the first that is exact on this model and its adapters is taken: "chunked" (a frozen linear head
and nothing after it), "selected" (the head sees the target positions only), "full" (all logits). Whether anything
follows the head is found by random numbers in place of its output. Each mode's loss is then compared with that over all
logits on real rows. It knows the head and whether rows have their own, and no model, no data and no method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from kitout import fast
from kitout.errors import ConfigError
from kitout.kit import Kit
from kitout.train.objectives.chunked_cross_entropy import (
    at_least_float32,
    chunked_cross_entropy,
    chunked_log_probs,
    cross_entropy_terms,
    log_prob_terms,
)

Terms = TypeVar("Terms", bound=tuple[Tensor, ...])
HeadLossMode = Literal["chunked", "selected", "full"]
# Of the loss; the modes differ by rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
ENCODER = "{name} is an encoder, whose tokens see those after them: take a decoder (AutoModelForCausalLM)"
PROBE_SPREAD = 1000.0  # of the random outputs of the head: large enough that a soft cap or scale after it shows


class HeadLoss:
    """`loss(run_model, positions, labels, weights)` runs the model once and takes the loss at these positions."""

    mode: HeadLossMode
    """How the loss is taken."""
    head: nn.Linear | None
    """The model's output head; None: "full" is the only mode."""

    def __init__(self, kit: Kit, mode: HeadLossMode, is_adapted: bool = False) -> None:
        """is_adapted: adapters act on the head, and those of different rows may differ."""
        self.kit, self.mode, self.head, self.is_adapted = kit, mode, output_head(kit), is_adapted

    @classmethod
    def choose(
        cls, kit: Kit, names: list[str], run_model: Any, positions: Tensor, labels: Tensor, log_probs: bool = False
    ) -> HeadLoss:
        """The first mode with the loss of all logits. run_model() calls the model and returns its output.

        log_probs: what `log_probs` gives is compared too, at every position (their mean difference).
        """
        full = cls(kit, "full")
        if full.head is None or not fast.enabled():
            return full
        weights = torch.full((len(labels),), 1.0 / len(labels), device=labels.device)
        with torch.no_grad():
            expected, expected_nll, _ = full(run_model, positions, labels, weights)
            tolerance = TOLERANCE.get(kit.dtype, 1e-4) * (1 + abs(expected.item()))
            is_adapted = not _head_is_frozen(kit, names, full.head)
            may_chunk = not is_adapted and _nothing_after_head(run_model, full.head)
            modes: list[HeadLossMode] = ["chunked", "selected"] if may_chunk else ["selected"]
            for mode in modes:
                candidate = cls(kit, mode, is_adapted)
                try:
                    difference = abs(candidate(run_model, positions, labels, weights)[0].item() - expected.item())
                    if log_probs and difference <= tolerance:
                        found = candidate.log_probs(run_model, positions, labels)[0]
                        difference = (found + expected_nll).abs().mean().item()
                    if is_adapted and difference <= tolerance:
                        by_row = candidate.logits(run_model, positions, by_row=True)
                        difference = abs(cross_entropy_terms(by_row, labels, weights)[0].item() - expected.item())
                except (RuntimeError, ValueError, IndexError):  # more follows the head than this mode allows for
                    continue
                if difference <= tolerance:
                    return candidate
        return full

    def __call__(
        self, run_model: Any, positions: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum with its gradient, each position's loss [N], and whether its label is the likeliest [N].

        positions [N]: those that predict a target, in the flattened [B * T]; labels, weights [N].
        """
        if self.head is None or self.mode != "chunked":
            return cross_entropy_terms(self.logits(run_model, positions), labels, weights)
        function = lambda h, weight, bias: chunked_cross_entropy(h, weight, bias, labels, weights)  # noqa: E731
        return _terms_in_head(self.head, run_model, positions, function)

    def log_probs(
        self, run_model: Any, positions: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The log-probability of each label [N] with its gradient, and the entropy in nats there [N] without one.

        positions [N]: those that predict a target, in the flattened [B * T]; labels [N]. temperature: logits are
        divided by it. Both results are float32, or float64 where the model is. No logits are kept for the backward
        where the mode is "chunked".
        """
        if self.head is None or self.mode != "chunked":
            logits = self.logits(run_model, positions)
            return log_prob_terms(logits if temperature == 1.0 else at_least_float32(logits) / temperature, labels)
        function = lambda h, weight, bias: chunked_log_probs(h, weight, bias, labels, temperature)  # noqa: E731
        return _terms_in_head(self.head, run_model, positions, function)

    def logits(self, run_model: Any, positions: Tensor, by_row: bool | None = None) -> Tensor:
        """The logits at these positions, [N, V]. by_row: as rows; None: where rows have heads of their own."""
        if self.head is None or self.mode == "full":
            logits: Tensor = run_model().logits
            return logits.reshape(-1, logits.shape[-1])[positions]
        if by_row is None:
            by_row = self.is_adapted and isinstance(self.kit.active, tuple)
        select = _SelectedPositions(positions, by_row)
        with select.at(self.head):
            logits = run_model().logits
        return select.of(logits)


def output_head(kit: Kit) -> nn.Linear | None:
    """The linear output head that the model itself names, or None."""
    get_head = getattr(kit.base, "get_output_embeddings", None)  # transformers' name for it; timm has none
    head = get_head() if get_head is not None else None
    return head if isinstance(head, nn.Linear) else None


def check_causal(kit: Kit) -> None:
    """ConfigError for a base whose every tower sees later tokens: it would see what it is to predict.

    Not beside images or sounds: these may stand in front of a causal text and see each other.
    """
    towers = kit.survey.towers
    if towers and all(tower.causal is False and not kit.survey.is_media_tower(tower) for tower in towers):
        raise ConfigError(ENCODER.format(name=type(kit.base).__name__))


def _head_is_frozen(kit: Kit, names: list[str], head: nn.Module) -> bool:
    """Whether none of these adapters acts on the head, trains it or replaces a module that holds it."""
    path = next(path for path, module in kit.base.named_modules() if module is head)
    is_adapted = any(path in kit[name].by_module for name in names)
    replaced = [key.replace("/", ".") for name in names for key in kit[name].heads]
    return not is_adapted and not any(path == other or path.startswith(f"{other}.") for other in replaced)


def _nothing_after_head(run_model: Any, head: nn.Linear) -> bool:
    """Whether the head's output is the model's: random numbers in its place come out unchanged."""
    outputs: list[Tensor] = []

    def forward(h: Tensor) -> Tensor:
        generator = torch.Generator(h.device).manual_seed(0)
        size = (*h.shape[:-1], head.out_features)
        outputs.append((PROBE_SPREAD * torch.randn(size, generator=generator, device=h.device)).to(h.dtype))
        return outputs[-1]

    with replaced_forward(head, forward):
        logits = run_model().logits
    if len(outputs) != 1 or logits.shape != outputs[0].shape:
        return False
    return torch.equal(logits.to(outputs[0].dtype), outputs[0])


def _hidden_at(args: tuple[Any, ...], positions: Tensor) -> Tensor:
    h: Tensor = args[0]
    return h.reshape(-1, h.shape[-1])[positions]


class _SelectedPositions:
    """What the head gets of [B, T, d]: these positions alone, as one row [1, N, d], or by_row: [B, M, d].

    by_row: where rows have a head of their own; M is the most that a row has, and what fills up others is left out
    again.
    """

    def __init__(self, positions: Tensor, by_row: bool) -> None:
        self.positions, self.by_row = positions, by_row
        self.kept: Tensor | None = None  # [N], of the flattened [B * M]

    @contextmanager
    def at(self, head: nn.Module) -> Iterator[None]:
        """The head gets them meanwhile."""
        handle = head.register_forward_pre_hook(lambda _module, args: (self._select(args), *args[1:]))
        try:
            yield
        finally:
            handle.remove()

    def of(self, logits: Tensor) -> Tensor:
        """[N, V] of what comes out."""
        flat = logits.reshape(-1, logits.shape[-1])
        if self.kept is not None:
            return flat[self.kept]
        if len(flat) != len(self.positions):
            raise ValueError(f"the head was given {len(self.positions)} positions, and {len(flat)} came out")
        return flat

    def _select(self, args: tuple[Any, ...]) -> Tensor:
        if not self.by_row:
            return _hidden_at(args, self.positions)[None]
        num_rows, length = args[0].shape[:2]
        owners = self.positions // length
        counts = owners.bincount(minlength=num_rows)
        most = int(counts.max())
        order = owners.argsort(stable=True)
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[owners[order]]
        self.kept = owners * most + ranks
        index = torch.zeros(num_rows * most, dtype=torch.long, device=order.device)
        index[self.kept] = self.positions
        return _hidden_at(args, index).unflatten(0, (num_rows, most))


def _terms_in_head(
    head: nn.Linear, run_model: Any, positions: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Terms]
) -> Terms:
    """function(h [N, d], weight, bias) within the head's forward, where a sharded weight is whole.

    The head returns zeros. They depend on the terms, so that DistributedDataParallel, which follows the graph from the
    output, sees which parameters are used.
    """
    terms: list[Terms] = []

    def forward(*args: Tensor) -> Tensor:
        weight, bias = _plain_weight(head.weight), None if head.bias is None else _plain_weight(head.bias)
        terms.append(function(_hidden_at(args, positions), weight, bias))
        zeros = torch.zeros(1, 1, head.out_features, dtype=args[0].dtype, device=args[0].device)
        return zeros + (0.0 * terms[-1][0].sum()).to(zeros.dtype)

    with replaced_forward(head, forward):
        run_model()
    return terms[0]


@contextmanager
def replaced_forward(head: nn.Module, forward: Any) -> Iterator[None]:
    """Replaces the head's forward meanwhile."""
    own_forward = head.__dict__.get("forward")
    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own_forward is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = own_forward


def _plain_weight(weight: Tensor) -> Tensor:
    """The weight as a plain float tensor; ValueError where it is stored in another way (quantized)."""
    value = weight.data
    if type(value) is not Tensor or not value.is_floating_point() or value.dtype.itemsize < 2:
        raise ValueError(f"a head stored as {type(value).__name__} of {value.dtype}")
    return value
