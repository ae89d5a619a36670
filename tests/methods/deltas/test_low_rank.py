"""The nodes of the low-rank map: models may write to what a projection returned, as DeBERTa and Longformer do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kitout.methods.deltas.low_rank import LowRankDelta, add_low_rank

WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "to it": lambda y: y.div_(3.0),
    "to a view": lambda y: y.view(2, 3, 2, 4).transpose(1, 2).div_(3.0),
    "to a part": lambda y: y[:, 1:].mul_(2.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("path", ["fused", "added", "overwritten"])
def test_results_of_a_projection_may_be_written_to(path: str, bias: bool, write: str) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 8, bias=bias), torch.randn(2, 3, 6, requires_grad=True)
    linear.requires_grad_(False)
    delta = LowRankDelta(torch.randn(2, 6), torch.randn(8, 2), 0.5)

    def run() -> Tensor:
        if path == "fused":
            y = delta.fused_linear(x, linear.weight, linear.bias)
            assert y is not None
        else:
            y = add_low_rank(x, linear(x), delta.a, delta.b, 0.5, may_overwrite=path == "overwritten")
        return WRITES[write](y)

    def plain() -> Tensor:
        return WRITES[write](linear(x) + 0.5 * (x @ delta.a.T @ delta.b.T))

    inputs = (x, delta.a, delta.b)
    for new, expected in zip(
        torch.autograd.grad(run().sin().sum(), inputs),
        torch.autograd.grad(plain().sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(new, expected)
