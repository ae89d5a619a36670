"""Strength, Mix and Stack at one module, against the formulas computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, BitFit, Kit, LoRA, Mix, Stack
from laws.activate import assert_same, put_on, run


class One(nn.Module):
    """One attention block whose pieces a test can compute itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([Piece()])

    def forward(self, x: Tensor) -> Tensor:
        return self.block[0](x)


class Piece(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v)
        return x + self.down(self.up(x).tanh())


ROLES = {"q$": "attn.q", "k$": "attn.k", "v$": "attn.v", "o$": "attn.o", "up$": "mlp.up", "down$": "mlp.down"}


@pytest.fixture
def piece() -> tuple[Kit, Piece, Tensor]:
    torch.manual_seed(0)
    model = One()
    x = torch.randn(2, 3, 4)
    kit = kitout.attach(model, roles=ROLES, example_batch={"x": x})
    put_on(kit, LoRA(rank=2, alpha=3, targets="mlp.down"), "low", seed=1)
    put_on(kit, LoRA(rank=1, alpha=2, targets="mlp.down"), "lower", seed=2)
    put_on(kit, IA3(targets="in:mlp.down"), "scale", seed=3)
    put_on(kit, BitFit(targets="mlp.down"), "shift", seed=4)
    return kit, model.block[0], x


def down(kit: Kit, piece: Piece, x: Tensor) -> Tensor:
    """What the down projection gives under the active route, on the input it has in this model."""
    values_seen: list[Tensor] = []
    handle = piece.down.register_forward_hook(lambda _, __, y: values_seen.append(y.detach().clone()))
    run(kit, {"x": x})
    handle.remove()
    return values_seen[0]


def pieces(kit: Kit, piece: Piece, x: Tensor) -> dict[str, Tensor]:
    """The input and output of the down projection, and each adapter's own values there."""
    values_seen: list[Tensor] = []
    handle = piece.down.register_forward_pre_hook(lambda _, args: values_seen.append(args[0].detach().clone()))
    with kit.use(None):
        y = down(kit, piece, x)
    handle.remove()
    key = "block/0/down"
    values = {f"{n}.{k}": v.detach() for n in kit.names for k, v in kit[n].named_parameters()}
    low = {n: (values[f"{n}.deltas.{key}.a"], values[f"{n}.deltas.{key}.b"]) for n in ("low", "lower")}
    h = values_seen[0]
    return {
        "h": h,
        "y": y,
        "low": 1.5 * h @ low["low"][0].T @ low["low"][1].T,
        "lower": 2.0 * h @ low["lower"][0].T @ low["lower"][1].T,
        "scale": values[f"scale.deltas.{key}@in.scale"],
        "shift": values[f"shift.deltas.{key}.shift"],
        "w": piece.down.weight.detach(),
        "b": piece.down.bias.detach(),
    }


def test_strength_is_y_plus_s_times_the_change(piece: tuple[Kit, Piece, Tensor]) -> None:
    kit, _, _ = piece
    p = pieces(*piece)
    for s in (0.3, -1.0, 2.5, 0.0, 1.0):
        for name in ("low", "scale", "shift"):
            kit.strength(name, s)
        with kit.use("low"):
            assert_same(down(*piece), p["y"] + s * p["low"], 1e-6)
        with kit.use("shift"):
            assert_same(down(*piece), p["y"] + s * p["shift"], 1e-6)
        with kit.use("scale"):  # an adapter of the input: x + s (scale x - x)
            assert_same(down(*piece), (p["h"] + s * (p["scale"] * p["h"] - p["h"])) @ p["w"].T + p["b"], 1e-6)


def test_a_mix_adds_weighted_changes(piece: tuple[Kit, Piece, Tensor]) -> None:
    kit, _, _ = piece
    p = pieces(*piece)
    with kit.use(Mix({"low": 0.7, "shift": -0.3, "lower": 2.0})):
        assert_same(down(*piece), p["y"] + 0.7 * p["low"] - 0.3 * p["shift"] + 2.0 * p["lower"], 1e-6)
    with kit.use(Mix({"low": 1.0})):
        mixed = down(*piece)
    with kit.use("low"):
        assert_same(mixed, down(*piece), 1e-6)
    kit.strength("low", 0.5)
    with kit.use(Mix({"low": 0.7})):
        assert_same(down(*piece), p["y"] + 0.35 * p["low"], 1e-6)


def test_a_mix_of_an_input_and_an_output_adapter(piece: tuple[Kit, Piece, Tensor]) -> None:
    """Each is the module as that adapter leaves it, whatever the other does."""
    kit, _, _ = piece
    put_on(kit, IA3(targets="mlp.down"), "gain", seed=9)
    gain = next(kit["gain"].parameters()).detach()
    p = pieces(*piece)
    scaled = (p["scale"] * p["h"]) @ p["w"].T + p["b"]
    with kit.use(Mix({"scale": 0.6, "shift": 0.5})):
        assert_same(down(*piece), p["y"] + 0.6 * (scaled - p["y"]) + 0.5 * p["shift"], 1e-6)
    with kit.use(Mix({"scale": 0.6, "gain": 0.5})):
        assert_same(down(*piece), p["y"] + 0.6 * (scaled - p["y"]) + 0.5 * (gain * p["y"] - p["y"]), 1e-6)


def test_a_stack_applies_in_order(piece: tuple[Kit, Piece, Tensor]) -> None:
    kit, _, _ = piece
    p = pieces(*piece)
    put_on(kit, IA3(targets="mlp.down"), "gain", seed=9)
    gain = next(kit["gain"].parameters()).detach()
    with kit.use(Stack("shift", "gain")):
        assert_same(down(*piece), (p["y"] + p["shift"]) * gain, 1e-6)
    with kit.use(Stack("gain", "shift")):
        assert_same(down(*piece), p["y"] * gain + p["shift"], 1e-6)
    with kit.use(Stack("low", "low")):
        assert_same(down(*piece), p["y"] + 2 * p["low"], 1e-6)
    with kit.use(Stack(None, "low")):
        assert_same(down(*piece), p["y"] + p["low"], 1e-6)


def test_an_input_adapter_stacked_last_comes_first(piece: tuple[Kit, Piece, Tensor]) -> None:
    """It takes the module as the others have left it: its scale reaches their input, not the other way round."""
    kit, _, _ = piece
    p = pieces(*piece)
    scaled = p["h"] * p["scale"]
    low = p["low"] @ torch.zeros(4, 4) + 1.5 * scaled @ _factors(kit)
    with kit.use(Stack("low", "scale")):
        assert_same(down(*piece), scaled @ p["w"].T + p["b"] + low, 1e-6)
    with kit.use(Stack("scale", "low")):
        assert_same(down(*piece), scaled @ p["w"].T + p["b"] + p["low"], 1e-6)


def _factors(kit: Kit) -> Tensor:
    values = dict(kit["low"].named_parameters())
    return (values["deltas.block/0/down.b"] @ values["deltas.block/0/down.a"]).detach().T
