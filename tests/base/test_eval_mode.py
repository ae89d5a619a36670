"""eval_mode restores modes, gradients and the random state, after an error too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kitout.base.eval_mode import eval_mode


def build() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2))
    model[1].eval()
    model[2].requires_grad_(False)
    return model


def state(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(("grad", "freeze"), [(False, False), (True, False), (True, True)])
def test_all_is_restored(grad: bool, freeze: bool) -> None:
    model, random_state = build(), torch.get_rng_state()
    original = state(model)

    def run_and_fail() -> None:
        with eval_mode(model, grad=grad, freeze=freeze):
            torch.rand(3)
            assert not any(m.training for m in model.modules())
            assert torch.is_grad_enabled() == grad
            assert model(torch.ones(1, 2)).requires_grad == (grad and not freeze)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_fail()
    assert state(model) == original
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_gradients_inside_inference_mode() -> None:
    model = build()
    with torch.inference_mode(), eval_mode(model, grad=True, freeze=True):
        x = torch.ones(1, 2, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None
        assert model[0].weight.grad is None
