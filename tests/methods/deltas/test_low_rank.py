"""The nodes of the low-rank map: models may write to what a projection returned, as DeBERTa and Longformer do."""

from __future__ import annotations

import pickle
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
def test_converted_values_are_kept_until_one_changes() -> None:
    delta = LowRankDelta(torch.randn(3, 16), torch.randn(24, 3), scale=0.7)
    kept = delta.factors_in(torch.bfloat16)
    assert all(a is b for a, b in zip(delta.factors_in(torch.bfloat16), kept, strict=True))
    assert pickle.loads(pickle.dumps(delta))._kept is None
    delta.b.mul_(2.0)
    assert torch.equal(delta.factors_in(torch.bfloat16)[1], 2 * kept[1])
    with torch.enable_grad():
        assert delta.factors_in(torch.bfloat16)[0].requires_grad
