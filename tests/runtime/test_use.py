"""Which route is active when: sticky, in a `with`, nested, left by an exception; by row, stacked, mixed.

Everything is checked against what one adapter alone gives; formulas are in modules/test_terms.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, BitFit, Kit, LoRA, Mix, Stack
from kitout.errors import RouteError, UnknownAdapter
from laws.activate import assert_same, kit_with, put_on, run
from zoo import ZOO, out, rows_of

LLAMA = ZOO["llama"]


@pytest.fixture
def kit(tiny_llama: nn.Module) -> Kit:
    kit = kitout.attach(tiny_llama)
    put_on(kit, LoRA(rank=2, targets="all-linear"), "a", seed=1)
    put_on(kit, LoRA(rank=3, alpha=4), "b", seed=2)
    put_on(kit, IA3(), "scale", seed=3)
    put_on(kit, BitFit(), "shift", seed=4)
    return kit


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return LLAMA.batch(3, 0)


@pytest.fixture
def alone(kit: Kit, batch: dict[str, Tensor]) -> dict[str | None, Tensor]:
    """What each adapter gives on its own, and the base."""
    values = {}
    for name in (None, *kit.names):
        with kit.use(name):
            values[name] = run(kit, batch)
    assert len({v.sum().item() for v in values.values()}) == len(values)
    return values


def test_use_is_sticky(kit: Kit, batch: dict[str, Tensor], alone: dict[str | None, Tensor]) -> None:
    kit.use("a")
    for _ in range(2):
        assert torch.equal(run(kit, batch), alone["a"])
        assert kit.active == "a"
    kit.use("b")
    assert torch.equal(run(kit, batch), alone["b"])
    kit.use(None)
    assert torch.equal(run(kit, batch), alone[None])


def test_a_with_ends_with_the_route_before_it(
    kit: Kit, batch: dict[str, Tensor], alone: dict[str | None, Tensor]
) -> None:
    kit.use("a")
    with kit.use("b") as inside:
        assert inside is kit
        assert torch.equal(run(kit, batch), alone["b"])
        with kit.use(None):
            assert torch.equal(run(kit, batch), alone[None])
        assert torch.equal(run(kit, batch), alone["b"])
    assert torch.equal(run(kit, batch), alone["a"])


def test_a_handle_entered_later_is_local_from_then_on(
    kit: Kit, batch: dict[str, Tensor], alone: dict[str | None, Tensor]
) -> None:
    handle = kit.use("a")
    assert torch.equal(run(kit, batch), alone["a"])
    with handle:
        assert torch.equal(run(kit, batch), alone["a"])
    assert torch.equal(run(kit, batch), alone[None])


def test_an_exception_leaves_the_with_as_any_other_way_out(
    kit: Kit, batch: dict[str, Tensor], alone: dict[str | None, Tensor]
) -> None:
    kit.use("a")
    with pytest.raises(ZeroDivisionError), kit.use("b"):
        raise ZeroDivisionError
    assert torch.equal(run(kit, batch), alone["a"])


def test_a_failing_forward_leaves_the_route_and_the_lock_as_they_were(
    kit: Kit, batch: dict[str, Tensor], alone: dict[str | None, Tensor]
) -> None:
    with kit.use("b"):
        with pytest.raises(Exception):  # noqa: B017 - whatever transformers makes of it
            kit(input_ids=torch.full((3, 2), 10_000))
        assert torch.equal(run(kit, batch), alone["b"])
    assert torch.equal(run(kit, batch), alone[None])


def test_a_to_b_and_back_is_bit_identical(kit: Kit, batch: dict[str, Tensor], alone: dict[str | None, Tensor]) -> None:
    for name in ("a", "b", "scale", None, "a", ["a", "b", None], "shift", "b"):
        with kit.use(name):
            value = run(kit, batch)
        if not isinstance(name, list):
            assert torch.equal(value, alone[name])


def test_rows_have_what_the_list_says(kit: Kit, batch: dict[str, Tensor], alone: dict[str | None, Tensor]) -> None:
    rows = ["scale", None, "a"]
    with kit.use(rows):
        value = run(kit, batch)
    for i, name in enumerate(rows):
        assert_same(value[i], alone[name][i])
    with kit.use(["a", "a", "a"]):
        assert_same(run(kit, batch), alone["a"])
    with kit.use((None, None, None)):
        assert torch.equal(run(kit, batch), alone[None])


def test_rows_may_be_stacks_and_mixes(kit: Kit, batch: dict[str, Tensor]) -> None:
    rows = [Stack("a", "scale"), Mix({"b": 0.5, Stack("shift", "a"): 0.25}), Stack("a", Mix({"b": 2.0}))]
    with kit.use(rows):
        value = run(kit, batch)
    for i, entry in enumerate(rows):
        with kit.use(entry):
            assert_same(value[i : i + 1], run(kit, rows_of(batch, i)))


def test_a_row_list_grows_with_beams(kit: Kit) -> None:
    ids = LLAMA.batch(2, 1)["input_ids"]
    with kit.use(["a", None]):
        searched = kit.generate(ids, num_beams=3, num_return_sequences=2, max_new_tokens=3, min_new_tokens=3)
    assert searched.shape[0] == 4


# --- what is refused ------------------------------------------------------------------------------------------


def test_unknown_names_are_all_reported_at_once_with_suggestions(kit: Kit, batch: dict[str, Tensor]) -> None:
    kit.use("a")
    with pytest.raises(UnknownAdapter) as error:
        kit.use(["scal", None, Stack("a", "zzz"), Mix({"bb": 1.0})])
    for text in ("'scal'", "did you mean 'scale'", "'zzz'", "'bb'", "3 errors"):
        assert text in str(error.value)
    assert kit.active == "a"
    with pytest.raises(KeyError):
        kit["nobody"]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (3, "cannot use 3"),
        ([], "empty list"),
        (["a", 3], "cannot use 3"),
        ([["a"], None], "cannot use"),
        ({"a": 1.0}, "Mix"),
    ],
)
def test_a_value_that_is_no_route_is_refused(kit: Kit, what: object, text: str) -> None:
    with pytest.raises(RouteError, match=text):
        kit.use(what)
    assert kit.active is None


@pytest.mark.parametrize("weights", [{}, {"a": math.nan}, {"a": math.inf}, {"a": "1"}])
def test_a_mix_needs_finite_weights(weights: dict[str, float]) -> None:
    with pytest.raises(RouteError, match="Mix"):
        Mix(weights)


def test_an_empty_stack_is_refused() -> None:
    with pytest.raises(RouteError, match="empty"):
        Stack()


@pytest.mark.parametrize("rows", [["a"], ["a", "b"], ["a", None, "b", "a"], [None] * 6])
def test_a_list_of_the_wrong_length_is_refused_in_the_forward(
    kit: Kit, batch: dict[str, Tensor], alone: dict[str | None, Tensor], rows: list[str | None]
) -> None:
    with kit.use(rows), pytest.raises(RouteError) as error:
        kit(**batch)
    assert f"names {len(rows)} rows" in str(error.value)
    assert "batch of 3" in str(error.value)
    with kit.use(rows), pytest.raises(RouteError):
        kit.generate(**batch, max_new_tokens=2)
    assert torch.equal(run(kit, batch), alone[None])


@pytest.mark.parametrize("value", [math.nan, math.inf, "2", None])
def test_strength_is_a_finite_number(kit: Kit, value: float) -> None:
    with pytest.raises(RouteError, match="finite"):
        kit.strength("a", value)
    with pytest.raises(UnknownAdapter):
        kit.strength("nobody", 1.0)


# --- coming and going ---------------------------------------------------------------------------------------------


def test_an_active_adapter_cannot_be_removed(kit: Kit, batch: dict[str, Tensor]) -> None:
    kit.use(["a", None, "b"])
    with pytest.raises(RouteError, match="active"):
        kit.remove("a")
    with kit.use("scale"), pytest.raises(RouteError, match="active"):
        kit.remove("scale")
    with kit.use("scale"), pytest.raises(RouteError, match="active"):
        kit.remove("b")  # what the kit goes back to
    assert kit.names == ["a", "b", "scale", "shift"]
    run(kit, batch)


def test_a_removed_adapter_leaves_nothing_behind(
    kit: Kit, batch: dict[str, Tensor], alone: dict[str | None, Tensor]
) -> None:
    kit.use("b")
    kit.use(["a", "b", "a"])
    run(kit, batch)
    handle = kit.use("scale")
    kit.remove("a")
    kit.remove("b")
    assert kit.names == ["scale", "shift"]
    assert not any("/@a" in k or k.startswith("adapters.@a") for k in kit.state_dict())
    with handle:
        assert torch.equal(run(kit, batch), alone["scale"])
    assert torch.equal(run(kit, batch), alone[None]), "falls back to what is still there"
    put_on(kit, LoRA(rank=2, targets="all-linear"), "a", seed=1)
    with kit.use("a"):
        assert torch.equal(run(kit, batch), alone["a"]), "the same name, method and seed: the same adapter"


def test_strength_changes_the_active_route_at_once(kit: Kit, batch: dict[str, Tensor]) -> None:
    kit.use(["a", None, "b"])
    before = run(kit, batch)
    kit.strength("b", 0.0)
    after = run(kit, batch)
    assert_same(after[:2], before[:2])
    with kit.use(None):
        assert_same(after[2], run(kit, batch)[2])


def test_new_values_are_seen_at_once_also_by_row(kit: Kit, batch: dict[str, Tensor]) -> None:
    """Gathered copies of an adapter's values, kept for decoding, follow the values."""
    with torch.no_grad(), kit.use(["a", None, "b"]):
        run(kit, batch)
        for p in kit["b"].parameters():
            p.mul_(2.0)
        assert_last_row_has_b(kit, batch)
        kit["b"].load_state_dict({n: 0.5 * v for n, v in kit["b"].state_dict().items()})
        assert_last_row_has_b(kit, batch)
        kit["b"].to(torch.float64)
        assert_last_row_has_b(kit, batch)
    with kit.use("b"):
        run_with_grad = out(kit(**batch))
    torch.optim.SGD(kit["b"].parameters(), lr=0.1).zero_grad()
    run_with_grad.square().mean().backward()
    torch.optim.SGD(kit["b"].parameters(), lr=0.1).step()
    with kit.use(["a", None, "b"]):
        assert_last_row_has_b(kit, batch)


def assert_last_row_has_b(kit: Kit, batch: dict[str, Tensor]) -> None:
    value = run(kit, batch)
    with kit.use("b"):
        assert_same(value[2:], run(kit, rows_of(batch, 2)))


def test_remove_waits_for_every_with() -> None:
    kit, _ = kit_with("llama", a=LoRA(), b=LoRA())
    with kit.use("a"), kit.use("b"), pytest.raises(RouteError, match="active"):
        kit.remove("a")
    kit.remove("a")
    handle = kit.use("b")
    with handle, handle:
        assert kit.active == "b"
