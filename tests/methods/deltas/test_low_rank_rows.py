"""Rows of several low-rank maps in one node: forward and every gradient as row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kitout
from kitout import LoRA
from kitout.methods.deltas.low_rank_rows import (
    EqualRunsLowRank,
    RowUnits,
    RunsLowRank,
    are_equal_runs,
    find_runs,
    fused_low_rank_rows,
)
from zoo import ZOO

SCALES = [0.5, 2.0, 3.0]


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1], [0, -1, 1, 1, 2, 0], [1, 1, 1, 1, 0, 2]])
def test_forward_and_gradients(rows: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.double, generator=draw).requires_grad_()

    a, b, x, y0 = [leaf(2, 7) for _ in SCALES], [leaf(6, 2) for _ in SCALES], leaf(6, 5, 7), leaf(6, 5, 6)
    wanted = torch.stack([y0[i] if k < 0 else y0[i] + SCALES[k] * x[i] @ a[k].T @ b[k].T for i, k in enumerate(rows)])
    runs, y = find_runs(rows), y0 * 1
    if are_equal_runs(runs, len(rows)):
        order = [number for number, _, _ in runs]
        scales = [SCALES[number] for number in order]
        found = EqualRunsLowRank.apply(x, y, scales, *(a[n] for n in order), *(b[n] for n in order))
    else:
        found = RunsLowRank.apply(x, y, runs, SCALES, *a, *b)
    g = torch.randn(6, 5, 6, dtype=torch.double, generator=draw)
    leaves = [x, y0, *a, *b]
    torch.testing.assert_close(found, wanted)
    for new, old in zip(torch.autograd.grad((found * g).sum(), leaves), torch.autograd.grad((wanted * g).sum(), leaves),
                        strict=True):  # fmt: skip
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize(
    "rows", [[0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1], [0, -1, 1, 1, 2, 0], [1, 1, 1, 1, 0, 0], [-1, 0, 0, 0, 2, 1]]
)
def test_linears_of_one_tensor_with_maps_of_unequal_ranks(rows: list[int], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.double, generator=draw).to(dtype).requires_grad_()

    own = torch.double if dtype == torch.double else torch.float32
    x, widths = leaf(6, 5, 7), (6, 4)
    linears = [(leaf(6, 7).detach(), leaf(6).detach()), (leaf(4, 7).detach(), None)]
    ranks = ((2, 3), (4, 1), (3, 3))
    changes = [
        [(leaf(r, 7, dtype=own), leaf(width, r, dtype=own), SCALES[k]) for r, width in zip(of_map, widths, strict=True)]
        for k, of_map in enumerate(ranks)
    ]
    units = RowUnits.of(rows, len(ranks))
    assert units is not None
    assert units.index(x.device) is units.index(x.device)  # made once
    found = fused_low_rank_rows(x, units, linears, changes)
    leaves = [x, *(factor for of_map in changes for a, b, _ in of_map for factor in (a, b))]
    wanted = []
    for i, (w, bias) in enumerate(linears):
        frozen = torch.nn.functional.linear(x.to(own), w.to(own), None if bias is None else bias.to(own))
        each = [
            frozen[r]
            if k < 0
            else frozen[r] + changes[k][i][2] * x[r].to(own) @ changes[k][i][0].T @ changes[k][i][1].T
            for r, k in enumerate(rows)
        ]
        wanted.append(torch.stack(each))
    tolerance: dict[str, float] = {} if dtype == torch.double else {"rtol": 0.05, "atol": 0.3}
    for new, old in zip(found, wanted, strict=True):
        torch.testing.assert_close(new.to(own), old, **tolerance)
    gs = [torch.randn(6, 5, width, dtype=torch.double, generator=draw).to(own) for width in widths]
    losses = [sum((y.to(own) * g).sum() for y, g in zip(ys, gs, strict=True)) for ys in (found, wanted)]
    both = [torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True) for loss in losses]
    for new, old in zip(*both, strict=True):
        assert new.dtype == old.dtype
        torch.testing.assert_close(new, old, **(tolerance and {"rtol": 0.05, "atol": 1.0}))


def test_long_runs_are_not_cut_into_many_units() -> None:
    assert RowUnits.of([0] * 7 + [1] * 8, 2) is None
    assert RowUnits.of([0] * 6 + [1] * 8, 2) == RowUnits(7, (0, 0, 0, 1, 1, 1, 1))
    assert RowUnits.of([0, 0, 1, 1], 2) == RowUnits(2, None)


@pytest.mark.parametrize("trained", ["ab", "a", "b"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 3)])
@pytest.mark.parametrize("rows", [["a", "a", "b", "b", "c", "c"], ["a", None, "b", "c", "c", "a"]])
def test_a_batch_of_several_adapters_learns_as_each_alone(
    ranks: tuple[int, ...], rows: list[str | None], trained: str
) -> None:
    """trained: of A and B; LoRA-FA trains B alone."""
    specimen = ZOO["llama"]
    kit = kitout.attach(specimen.build()).eval()
    for number, (name, rank) in enumerate(zip("abc", ranks, strict=True)):
        adapter = kit.add(name, LoRA(rank=rank, targets="all-linear"), seed=number)
        for path, value in adapter.named_parameters():
            value.data.add_(0.05)
            value.requires_grad_(path[-1] in trained)
    batch = specimen.batch(len(rows), 0)
    with kit.use(rows):
        kit(**batch).logits.square().sum().backward()
    values = {name: [value for value in kit[name].parameters() if value.requires_grad] for name in "abc"}
    found = {name: [_grad_of(value).clone() for value in values[name]] for name in "abc"}
    for name in "abc":
        kit[name].zero_grad()
        own = [i for i, active in enumerate(rows) if active == name]
        with kit.use(name):
            kit(**{key: value[own] for key, value in batch.items()}).logits.square().sum().backward()
        for joint, value in zip(found[name], values[name], strict=True):
            torch.testing.assert_close(joint, _grad_of(value), rtol=1e-4, atol=1e-4)


def _grad_of(value: Tensor) -> Tensor:
    assert value.grad is not None
    return value.grad
