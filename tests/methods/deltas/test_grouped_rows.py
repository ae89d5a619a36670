"""Products over rows as GPUs take them against each row's own map, on a CPU, where torch has them too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import LoRA, fast
from kitout.methods.deltas import grouped_rows, low_rank
from kitout.methods.deltas.low_rank import LowRankDelta

ROWS = {
    "in order": (0, 0, 1, 2, 2),
    "mixed": (2, 0, 1, 0, 2),
    "some without": (-1, 2, 0, -1, 2),
    "one alone unused": (2, 2, 0, 2, 0),
    "all without": (-1, -1, -1, -1, -1),
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_rows, "DEVICES", ("cpu",))


def deltas(*ranks: int) -> list[LowRankDelta]:
    return [LowRankDelta(torch.randn(r, 16), torch.randn(24, r), scale=0.5 + r) for r in ranks]


def alone(maps: list[LowRankDelta], rows: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    """Each row by itself, in float32."""
    parts = [maps[n](x[i].float(), y[i].float()) if n >= 0 else y[i].float() for i, n in enumerate(rows)]
    return torch.stack(parts)


@pytest.fixture(params=["groups", "side by side"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In which products are taken; by name as in the cache."""
    monkeypatch.setattr(grouped_rows, "MASKED_OPERATIONS", 0 if request.param == "groups" else 1e12)
    name: str = request.param
    return name


@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (5,)], ids=["one token", "tokens", "no tokens"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@torch.no_grad()
def test_each_row_has_its_own_map(rows: tuple[int, ...], shape: tuple[int, ...], form: str) -> None:
    maps = deltas(3, 8, 11)
    x, y = torch.randn(*shape, 16).bfloat16(), torch.randn(*shape, 24).bfloat16()
    expected = alone(maps, rows, x, y)
    cache: dict[str, Any] = {}
    for _ in range(2):  # the second time from the cache
        found = LowRankDelta.forward_rows(maps, rows, x, y.clone(), cache)
        assert found is not None
        assert form in cache
        torch.testing.assert_close(found.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0.03)
    maps[2].b.mul_(2.0)
    found = LowRankDelta.forward_rows(maps, rows, x, y.clone(), cache)
    assert found is not None
    expected = alone(maps, rows, x, y)
    torch.testing.assert_close(found.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0.03)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_a_value_that_is_not_finite_stays_in_its_rows(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_rows, "MASKED_OPERATIONS", 1e12)
    maps = deltas(3, 8)
    maps[1].b[0, 0] = value
    x, y = torch.randn(2, 1, 16), torch.randn(2, 1, 24)
    found = LowRankDelta.forward_rows(maps, (0, 1), x, y.clone(), {})
    assert found is not None
    torch.testing.assert_close(found[:1], alone(maps[:1], (0,), x[:1], y[:1]))
    assert not found[1].isfinite().all()
    maps[1].b[0, 0], x[1] = 1.0, value  # nor does that of an input
    found = LowRankDelta.forward_rows(maps, (0, 1), x, y.clone(), cache := {})
    assert found is not None
    assert "side by side" in cache
    torch.testing.assert_close(found[:1], alone(maps[:1], (0,), x[:1], y[:1]))


def test_only_few_operations_with_all_maps() -> None:
    x, y = torch.zeros(64, 1, 2048), torch.zeros(64, 1, 8192)
    assert grouped_rows.can_mask(x, y, 64, 8)
    assert not grouped_rows.can_mask(x.expand(64, 64, 2048), y.expand(64, 64, 8192), 64, 8)


def test_only_dtypes_and_widths_of_the_product() -> None:
    x, y = torch.zeros(2, 16).bfloat16(), torch.zeros(2, 24).bfloat16()
    assert grouped_rows.can_group(x, y)
    assert not grouped_rows.can_group(x, y.float())
    assert not grouped_rows.can_group(x[:, :12], y)
    assert not grouped_rows.can_group(x, y[:, :20])


@torch.no_grad()
def test_a_model_with_rows_of_many(tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    calls = []
    name = "add_to_groups" if form == "groups" else "add_masked"
    add = getattr(low_rank, name)
    monkeypatch.setattr(low_rank, name, lambda *args: (calls.append(args), add(*args))[1])
    kit = kitout.attach(tiny_llama.to(torch.bfloat16)).eval()
    for name, rank in {"a": 2, "b": 8}.items():
        for value in kit.add(name, LoRA(rank=rank), seed=0).parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    ids = torch.randint(1, 60, (4, 5))
    route = ("a", "b", None, "a")
    with kit.use(route):
        grouped = kit(input_ids=ids).logits
    with fast.disabled(), kit.use(route):  # nothing more is called
        plain = kit(input_ids=ids).logits
    assert len(calls) == len(kit["a"].sites)
    torch.testing.assert_close(grouped, plain, atol=0.05 * float(plain.abs().max()), rtol=0.05)
