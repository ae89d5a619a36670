"""The rules on 3 x 3 matrices, against values computed by hand, and through `combine` on a model of 3 x 3 matrices."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kitout
from kitout import LoRA
from kitout.errors import ConfigError
from kitout.fuse.rules import RULES, check_rule, largest, number_kept

FIRST = torch.tensor([[4.0, -3.0, 0.0], [1.0, 0.0, -2.0], [0.5, 6.0, -1.0]])
SECOND = torch.tensor([[-2.0, 5.0, 1.0], [0.0, 3.0, -4.0], [-6.0, 0.25, 1.0]])
WEIGHTS = (1.0, -0.5)


def draw(number: int, shape: torch.Size) -> Tensor:
    return torch.full(shape, 0.4 + 0 * number)


def apply(how: str, weights: tuple[float, ...] = WEIGHTS, **options: float) -> Tensor:
    rule = RULES[how]
    chosen = {"density": None, "gamma": None, "epsilon": None} | options
    assert rule.elementwise is not None
    return rule.elementwise([FIRST, SECOND], weights, check_rule(rule, weights, **chosen), draw)


BY_HAND = {
    # Kept: 6, 4, -3 and -6, 5, -4. At (0, 1) the weighted values -3 and -2.5 agree, the plain ones 3 and 5 would not.
    "ties": ({"density": 1 / 3}, WEIGHTS, [[4, -5.5 / 1.5, 0], [0, 0, 4], [6, 6, 0]]),
    "magnitude": ({"density": 1 / 3}, WEIGHTS, [[4, -5.5, 0], [0, 0, 2], [3, 6, 0]]),
    # Without 6 and -6; then five each, of the two equal ones of the second the first.
    "breadcrumbs": ({"density": 0.56, "gamma": 0.12}, (1.0, 2.0), [[0, 7, 2], [1, 6, -10], [0, 0, -1]]),
    # By row p is 0.25, 0.5, 0.75 from the smallest on; 0.4 drops the smallest of each row.
    "della": (
        {"density": 0.5, "epsilon": 0.25},
        WEIGHTS,
        [[44 / 9, -56 / 9, 0], [2, -6, 16 / 3], [8, 8, -2]],
    ),
    "dare": ({"density": 0.5}, WEIGHTS, [[10, -11, -1], [2, -3, 0], [7, 11.75, -3]]),
    "dare-ties": (
        {"density": 0.5},
        WEIGHTS,
        [[10 / 1.5, -11 / 1.5, -2], [2, -6, 8], [7 / 1.5, 12, -2]],
    ),
    # Selected: (0, 0), (0, 1), (2, 0), (2, 1), with the energies 61.25 and 65.0625.
    "sce": (
        {"density": 0.45},
        (1.0, 1.0),
        [[4, 5, 0], [0, 0, 0], [-6, (6 * 61.25 + 0.25 * 65.0625) / 126.3125, 0]],
    ),
}


@pytest.mark.parametrize("how", BY_HAND)
def test_by_hand(how: str) -> None:
    options, weights, expected = BY_HAND[how]
    assert torch.allclose(
        apply(how, weights, **options), torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6
    )


def test_dare_ties_by_hand_at_a_tie() -> None:
    """(1, 2): -4 and 4 cancel, and 0 counts as plus, so the positive one stays alone."""
    assert apply("dare-ties", density=0.5)[1, 2] == 8


def test_breadcrumbs_that_may_not_drop_all_of_its_largest() -> None:
    """Seven stay, so two go: both from the top, though gamma would take four."""
    kept = apply("breadcrumbs", (1.0, 0.0), density=0.8, gamma=0.5)
    assert torch.equal(kept, torch.tensor([[0.0, -3.0, 0.0], [1.0, 0.0, -2.0], [0.5, 0.0, -1.0]]))


def coefficients(how: str, weights: tuple[float, ...], *matrices: Tensor) -> list[float]:
    flat = torch.stack([m.double().flatten() for m in matrices])
    rule = RULES[how]
    assert rule.coefficients is not None
    check_rule(rule, weights, None, None, None)
    return rule.coefficients(weights, flat @ flat.T)


def test_stock_by_hand() -> None:
    """Both have the norm 3, and the cosine 8/9: t = 16/17, on the mean."""
    one, two = torch.diag(torch.tensor([1.0, 2.0, 2.0])), torch.diag(torch.tensor([2.0, 2.0, 1.0]))
    assert coefficients("stock", (1.0, 1.0), one, two) == pytest.approx([8 / 17, 8 / 17])
    assert coefficients("stock", (1.0, 1.0), FIRST, SECOND) == [0, 0]  # they point apart
    assert coefficients("stock", (1.0, 1.0), one, torch.zeros(3, 3)) == [1, 0]  # one of them has no part in it


def test_slerp_by_hand() -> None:
    one, two = torch.diag(torch.tensor([2.0, 0, 0])), torch.diag(torch.tensor([0, 3.0, 0]))
    assert coefficients("slerp", (1.0, 1.0), one, two) == pytest.approx([math.sqrt(0.5)] * 2)
    assert coefficients("slerp", (2.0, 1.0), one, two) == pytest.approx([math.sqrt(3) / 2, 0.5])
    assert coefficients("slerp", (3.0, 1.0), one, one) == pytest.approx([0.75, 0.25])
    assert coefficients("slerp", (3.0, 1.0), one, 0 * one) == pytest.approx([0.75, 0.25])


def test_exactly_k_are_largest() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    for k in range(6):
        assert int(largest(values, k).sum()) == k
    assert number_kept(0.29, 100) == 29


class Square(nn.Module):
    """One attention block of 3 x 3 matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in "qkvo"})])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["o"](F.scaled_dot_product_attention(layer["q"](x), layer["k"](x), layer["v"](x)))
        return x


@pytest.mark.parametrize("how", ["ties", "magnitude", "breadcrumbs", "sce", "mean"])
def test_combine_applies_the_rule_to_every_matrix(how: str) -> None:
    torch.manual_seed(0)
    model = Square().eval()
    kit = kitout.attach(model, example_batch={"x": torch.randn(1, 4, 3)})
    for name, matrix in (("a", FIRST), ("b", SECOND)):
        adapter = kit.add(name, LoRA(rank=3, targets="q v"))
        for delta in adapter.deltas.values():
            delta.a.data, delta.b.data = torch.eye(3), matrix / 2  # alpha = 2 * rank
    options, weights, expected = BY_HAND.get(how, ({}, (3.0, 1.0), (0.75 * FIRST + 0.25 * SECOND).tolist()))
    fused = kitout.combine(kit, "c", dict(zip("ab", weights, strict=True)), how=how, lam=2.0, to="dense", **options)
    for path in ("layers.0.q", "layers.0.v"):
        found = kit.merged_copy("c").get_submodule(path).weight - model.get_submodule(path).weight
        assert torch.allclose(found, 2 * torch.tensor(expected, dtype=torch.float32), atol=1e-5)
    assert fused.residual.total <= 1e-6


@pytest.mark.parametrize("how", [*RULES])
def test_at_full_density_one_adapter_alone_is_itself(how: str) -> None:
    torch.manual_seed(0)
    kit = kitout.attach(Square().eval(), example_batch={"x": torch.randn(1, 4, 3)})
    for name in "ab":
        adapter = kit.add(name, LoRA(rank=3, targets="q v"))
        for delta in adapter.deltas.values():
            delta.get_parameter("b").data.normal_()
    options = {"density": 1.0} if RULES[how].density is not None else {}
    options |= {"breadcrumbs": {"gamma": 0.0}, "della": {"density": 0.5, "epsilon": 0.0}}.get(how, {})
    kitout.combine(kit, "c", {"a": 1.0, "b": 0.0}, how=how, **options)
    found, wanted = (kit.merged_copy(name).get_submodule("layers.0.q").weight for name in "ca")
    start = kit.base.get_submodule("layers.0.q").weight
    if how == "della":  # each value stays with probability 1/2 and is doubled
        kept = found != start
        assert torch.allclose(found[kept] - start[kept], 2 * (wanted - start)[kept], atol=1e-6)
    else:
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "weights", "options", "match"),
    [
        ("mean", (1.0, -1.0), {}, "add up to 0"),
        ("slerp", (1.0, 1.0, 1.0), {}, "found 3"),
        ("slerp", (1.0, -1.0), {}, "at least 0"),
        ("stock", (1.0, 0.5), {}, "give all the same"),
        ("sum", (1.0,), {"density": 0.5}, "it has no density; density belongs to ties"),
        ("ties", (1.0,), {"gamma": 0.1}, "gamma belongs to breadcrumbs"),
        ("dare", (1.0,), {"density": 0.0}, "above 0, at most 1"),
        ("della", (1.0,), {"density": 0.1}, "probabilities"),
    ],
)
def test_options_out_of_range(how: str, weights: tuple[float, ...], options: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_rule(RULES[how], weights, **({"density": None, "gamma": None, "epsilon": None} | options))
