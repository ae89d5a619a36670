"""Rows outside of the usual call: values replaced between calls, inference mode before training, an encoder alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kitout
from kitout import IA3, LoRA, fast
from kitout.errors import RouteError
from laws.activate import kit_with, run
from zoo import out


def test_gathered_rows_follow_replaced_values() -> None:
    kit, batch = kit_with("llama", a=LoRA(), b=LoRA())
    kit.eval()
    route = ["a", "b"]
    with kit.use(route):
        run(kit, batch)
    new = {k: torch.randn_like(v) for k, v in kit.state_dict().items()}
    kit.load_state_dict(new, assign=True)
    with kit.use(route):
        rows = run(kit, batch)
    with kit.use("a"):
        alone = run(kit, {k: v[:1] for k, v in batch.items()})
    assert torch.allclose(rows[:1], alone, atol=1e-4 * alone.abs().max().item())


@pytest.mark.parametrize("is_counted", [False, True])
def test_rows_seen_first_under_inference_mode_can_be_trained(is_counted: bool) -> None:
    kit, batch = kit_with("llama", a=LoRA(), i=IA3())
    batch = {name: torch.cat((value, value[:1])) for name, value in batch.items()}
    with kit.use(["a", "i", "a"]):
        with torch.inference_mode(), FlopCounterMode(display=False) if is_counted else nullcontext():
            kit.base(**batch)
        out(kit(**batch)).sum().backward()
    assert all(p.grad is not None for p in kit["i"].parameters())


def test_rows_outside_of_a_call_are_not_guessed() -> None:
    kit, batch = kit_with("t5", a=LoRA(), b=LoRA())
    ids = batch["input_ids"]
    with kit.use(["a", "b"]):
        kit.base.get_encoder()(ids)
        with pytest.raises(RouteError, match="4 rows"):
            kit.base.get_encoder()(torch.cat((ids, ids)))


class Repeated(nn.Module):
    """A module behind one that sees each row so many times, and no row with 0."""

    times = 2

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).repeat_interleave(self.times, 0))


@pytest.mark.parametrize("route", [["low", "lower"], ["low", None], ["scale", "low"]])
@pytest.mark.parametrize("has_grad", [True, False])
def test_a_module_that_sees_no_row_gives_none(route: list[str | None], has_grad: bool) -> None:
    model = Repeated()
    kit = kitout.attach(model, roles={"^first$": "attn.q", "^second$": "attn.v"})
    for name, method in (("low", LoRA(rank=2)), ("lower", LoRA(rank=3)), ("scale", IA3(targets="attn.v"))):
        kit.add(name, method)
    with kit.use(route), torch.set_grad_enabled(has_grad):
        for times in (2, 0):
            model.times = times
            assert kit(torch.ones(2, 4)).shape == (2 * times, 6)
            with fast.disabled():
                assert kit(torch.ones(2, 4)).shape == (2 * times, 6)
