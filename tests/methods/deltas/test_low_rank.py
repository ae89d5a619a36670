"""The nodes of the low-rank map: models may write to what a projection returned, as DeBERTa and Longformer do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kitout.methods.deltas.fused_low_rank import takes_float32
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


@pytest.mark.parametrize("positions", [1, 16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_few_positions_of_half_precision_are_rounded_once(dtype: torch.dtype, positions: int) -> None:
    """Products in float32, which are faster there as well; of more positions they are in the base's dtype."""
    delta = LowRankDelta(torch.randn(3, 16), torch.randn(24, 3), scale=0.7)

    def is_rounded_once(found: Tensor, x: Tensor, y: Tensor) -> bool:
        a, b = delta.a.double(), delta.b.double()
        exact = y.double() + 0.7 * (x.double() @ a.t() @ b.t())
        return bool(((found - exact).abs() <= 0.5001 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all())

    x, y = torch.randn(positions, 1, 16).to(dtype), torch.randn(positions, 1, 24).to(dtype)
    assert is_rounded_once(delta.forward_(x, y.clone()), x, y)
    assert is_rounded_once(delta(x, y), x, y)
    rows = LowRankDelta.forward_rows([delta], (0,) * positions, x, y.clone(), {})
    assert rows is not None
    assert is_rounded_once(rows, x, y)
    x, y = torch.randn(17, 16).to(dtype), torch.randn(17, 24).to(dtype)
    assert not is_rounded_once(delta.forward_(x, y.clone()), x, y)


@torch.no_grad()
def test_few_positions_leave_a_view_alone_and_an_embedding_to_its_map() -> None:
    delta, big = LowRankDelta(torch.randn(3, 16), torch.randn(24, 3), scale=0.7), torch.zeros(4, 48).bfloat16()
    x = torch.randn(4, 16).bfloat16()
    for y in (big[:, :24], torch.zeros(24).bfloat16().expand(4, 24)):
        found = delta.forward_(x, y)
        assert not y.any()
        torch.testing.assert_close(found.float(), 0.7 * (x.float() @ delta.a.t() @ delta.b.t()), rtol=0.01, atol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_float32(x, found)
    assert takes_float32(x, found)


def test_the_number_of_positions_is_no_condition_of_a_traced_graph() -> None:
    delta = LowRankDelta(torch.randn(3, 16), torch.randn(24, 3), scale=0.7).bfloat16().requires_grad_(False)
    graphs: list[object] = []

    def count(graph: nn.Module, _: object) -> nn.Module:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, y: delta(x, y), backend=count, dynamic=True)
    with torch.no_grad():
        for positions in (40, 20, 15, 8):
            compiled(torch.randn(positions, 16).bfloat16(), torch.randn(positions, 24).bfloat16())
    assert len(graphs) == 1


@torch.no_grad()
def test_rows_of_parametrized_values_are_read_at_each_call() -> None:
    """They have no version counters of their own."""

    class Times(nn.Module):
        by = 1.0

        def forward(self, value: Tensor) -> Tensor:
            return value * self.by

    delta, times = LowRankDelta(torch.randn(3, 16), torch.randn(24, 3), scale=0.7), Times()
    nn.utils.parametrize.register_parametrization(delta, "b", times)
    x, cache = torch.randn(2, 1, 16), {}
    first = LowRankDelta.forward_rows([delta], (0, -1), x, torch.zeros(2, 1, 24), cache)
    times.by = 2.0
    second = LowRankDelta.forward_rows([delta], (0, -1), x, torch.zeros(2, 1, 24), cache)
    assert first is not None
    assert second is not None
    torch.testing.assert_close(second, 2 * first)
