"""What is asked in eval mode leaves modes, gradients and random numbers as they were, after an error too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kitout.base.eval_mode import eval_mode


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2))
    made[1].eval()
    made[2].requires_grad_(False)
    return made


def state(made: nn.Module) -> tuple[list[bool], list[bool]]:
    return [m.training for m in made.modules()], [p.requires_grad for p in made.parameters()]


@pytest.mark.parametrize(("grad", "freeze"), [(False, False), (True, False), (True, True)])
def test_all_is_restored(grad: bool, freeze: bool) -> None:
    made, random = model(), torch.get_rng_state()
    before = state(made)

    def ask() -> None:
        with eval_mode(made, grad=grad, freeze=freeze):
            torch.rand(3)
            assert not any(m.training for m in made.modules())
            assert torch.is_grad_enabled() == grad
            assert made(torch.ones(1, 2)).requires_grad == (grad and not freeze)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask()
    assert state(made) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_gradients_below_inference_mode() -> None:
    made = model()
    with torch.inference_mode(), eval_mode(made, grad=True, freeze=True):
        x = torch.ones(1, 2, requires_grad=True)
        made(x).sum().backward()
        assert x.grad is not None
        assert made[0].weight.grad is None
