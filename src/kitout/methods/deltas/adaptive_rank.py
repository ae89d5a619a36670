"""Ranks that follow from training: the triplets of a LoRA, scored step by step and cut to a budget on a schedule.

Zhang et al. 2023 (AdaLoRA, arXiv 2303.10512), code QingruZhang/AdaLoRA: sensitivity |w g|, its moving mean and
uncertainty, the cubic schedule. A triplet here is row k of A, column k of B and lambda_k, which is no parameter of its
own but part of B: lambda_k dL/dlambda_k = sum_j B_jk dL/dB_jk. So what is trained is a LoRA at any time. There is no
orthogonality penalty. It knows values, gradients and costs, and nothing of settings or loops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BETA = 0.85  # of both moving averages
FIRST_SHARE, LAST_SHARE = 0.1, 0.5  # of the steps: nothing is cut in the first, and nothing any more in the last


class TripletImportance(nn.Module):
    """What is remembered of one pair A, B between steps; of training alone, so that no file has it."""

    alive: Tensor
    """[r], bool: the triplets that are not cut."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        shapes = {"a": a.shape, "b": b.shape, "value": a.shape[:1]}
        for name, shape in shapes.items():
            # On CPU whatever the default device: an adapter that is read from a file is built on the meta device.
            self.register_buffer(f"mean_{name}", torch.zeros(shape, device="cpu"), persistent=False)
            self.register_buffer(f"uncertainty_{name}", torch.zeros(shape, device="cpu"), persistent=False)
        self.register_buffer("alive", torch.ones(len(a), dtype=torch.bool, device="cpu"), persistent=False)

    @torch.no_grad()
    def update(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Takes one step's gradients into account; a site without any had no part in the step."""
        if a.grad is None or b.grad is None:
            return
        self.to(a.device)
        signed = b * b.grad
        sensitivities = {"a": (a * a.grad).abs(), "b": signed.abs(), "value": signed.sum(0).abs()}
        for name, sensitivity in sensitivities.items():
            mean, uncertainty = self.get_buffer(f"mean_{name}"), self.get_buffer(f"uncertainty_{name}")
            mean.lerp_(sensitivity.to(mean.dtype), 1 - BETA)
            uncertainty.lerp_((sensitivity.to(mean.dtype) - mean).abs(), 1 - BETA)

    def scores(self) -> Tensor:
        """[r]: s(lambda_k) + mean s(A_k) + mean s(B_k), s = mean x uncertainty."""
        a, b, value = (
            self.get_buffer(f"mean_{name}") * self.get_buffer(f"uncertainty_{name}") for name in ("a", "b", "value")
        )
        return value + a.mean(1) + b.mean(0)

    @torch.no_grad()
    def clear_cut(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Values of triplets that are cut stay 0, whatever the optimizer's momentum does to them."""
        dead = ~self.alive.to(a.device)
        a.masked_fill_(dead[:, None], 0.0)
        b.masked_fill_(dead, 0.0)


TripletGroup = Sequence[tuple[TripletImportance, int]]
"""The sites of one module, each with the parameters of one of its triplets; they have one rank, so the k-th triplets of
all of them are cut together."""


def triplets_of(delta: nn.Module) -> TripletImportance:
    """What an adaptive LoRA remembers at one site."""
    found = delta.get_submodule("triplets")
    assert isinstance(found, TripletImportance)
    return found


def last_cut_step(num_steps: int) -> int:
    """After so many steps ranks are final."""
    return num_steps - int(LAST_SHARE * num_steps)


def budget_at(done: int, num_steps: int, start: int, target: int) -> float | None:
    """What may be left after `done` steps, from `start` to `target`; None where nothing is cut then."""
    first, last = int(FIRST_SHARE * num_steps), last_cut_step(num_steps)
    if done <= first:
        return None
    if done >= last:
        return target
    return target + (start - target) * (1 - (done - first) / (last - first)) ** 3


def cut_to(groups: Sequence[TripletGroup], budget: float) -> None:
    """Cuts the triplets of the lowest scores until no more parameters are left than the budget. Once cut, for good."""
    units: list[tuple[float, int, int, int]] = []
    for number, group in enumerate(groups):
        size = max(len(importance.alive) for importance, _ in group)
        scores, costs = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
        for importance, cost in group:
            alive = importance.alive.cpu()
            scores[: len(alive)] += importance.scores().double().cpu() * alive
            costs[: len(alive)] += cost * alive
        units += [(scores[k].item(), number, k, int(costs[k])) for k in range(size) if costs[k] > 0]
    left = sum(cost for *_, cost in units)
    for _, number, k, cost in sorted(units):
        if left <= budget:
            return
        for importance, _ in groups[number]:
            if k < len(importance.alive):
                importance.alive[k] = False
        left -= cost


def cut_after_step(
    sites: Sequence[tuple[str, nn.Module, int]], start: int, target: int, step: int, num_steps: int
) -> None:
    """Scores and cuts after one optimizer step. sites: path, Delta with a, b and triplets, parameters of a triplet."""
    factors = [(triplets_of(delta), delta.get_parameter("a"), delta.get_parameter("b")) for _, delta, _ in sites]
    if step < last_cut_step(num_steps):
        for importance, a, b in factors:
            importance.update(a, b)
    budget = budget_at(step + 1, num_steps, start, target)
    if budget is None:
        return
    by_path: dict[str, list[tuple[TripletImportance, int]]] = {}
    for (path, _, cost), (importance, _, _) in zip(sites, factors, strict=True):
        by_path.setdefault(path, []).append((importance, cost))
    cut_to([*by_path.values()], budget)
    for importance, a, b in factors:
        importance.clear_cut(a, b)
