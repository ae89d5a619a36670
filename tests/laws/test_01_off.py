"""Law 1: off is bit-identical to the base, and detach leaves no trace.

A model with modes and requires_grad of its own choosing is attached, dressed, trained on, undressed and detached; its
classes, keys, bits, hooks, modes and the very attribute names of each module are as before.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import kitout
from kitout import Kit, LoRA
from laws.activate import add_parts, fresh_model, loss_of, pristine, put_on, run, start_of
from laws.cases import CELLS, Case, name_of
from zoo import Specimen

cells = pytest.mark.parametrize(("specimen", "case"), CELLS, ids=name_of)


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that attaching could leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "classes": {n: type(m) for n, m in modules.items()},
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "hooks": {n: [len(getattr(m, h)) for h in hooks] for n, m in modules.items()},
        "modes": {n: m.training for n, m in modules.items()},
        "grads": {n: (id(p), p.requires_grad, p.grad) for n, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {n: id(b) for n, b in model.named_buffers(remove_duplicate=False)},
        "keys": list(model.state_dict()),
    }


def unusual(model: nn.Module) -> nn.Module:
    """Modes and requires_grad that are neither all on nor all off."""
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    return model


@cache
def attached(specimen: Specimen) -> tuple[Kit, dict[str, Any]]:
    """A kit on an unusual model, attached once per process: copy it. The trace of the model before."""
    model = unusual(fresh_model(specimen))
    before = trace(model)
    rng = torch.random.get_rng_state()
    kit = kitout.attach(model)
    assert torch.equal(torch.random.get_rng_state(), rng), "attach drew random numbers"
    assert trace(model)["modes"] == before["modes"]
    assert list(model.state_dict()) == before["keys"]
    assert all(isinstance(m, before["classes"][n]) for n, m in model.named_modules())
    return kit, before


def copy_of_attached(specimen: Specimen) -> tuple[Kit, dict[str, Any]]:
    """The same in a copy, whose tensors are others."""
    original, before = attached(specimen)
    kit = copy.deepcopy(original)
    parameters = dict(kit.base.named_parameters(remove_duplicate=False))
    buffers = {n: id(b) for n, b in kit.base.named_buffers(remove_duplicate=False)}
    grads = {n: (id(parameters[n]), *rest) for n, (_, *rest) in before["grads"].items()}
    return kit, {**before, "grads": grads, "buffers": buffers}


def test_detach_gives_back_the_very_model(specimen: Specimen) -> None:
    model = unusual(fresh_model(specimen))
    before = trace(model)
    kit = kitout.attach(model)
    put_on(kit, LoRA(rank=2))
    kit.use("law")
    assert kit.detach() is model
    assert trace(model) == before


@cells
def test_off_is_the_base_and_detach_leaves_no_trace(specimen: Specimen, case: Case) -> None:
    plain, batch = pristine(specimen.name), specimen.batch(2, 0)
    bits, want = plain.state_dict(), run(plain, batch)
    kit, before = copy_of_attached(specimen)
    model = kit.base
    add_parts(kit, case)
    put_on(kit, case.method, start=start_of(specimen.name, case.method))
    assert torch.equal(run(kit, batch), want), "an adapter that is not active changes the outputs"
    with kit.use("law"):
        if case.trains:
            loss_of(kit(**batch)).backward()
        assert not torch.equal(run(kit, batch), want), "an active adapter changes nothing"
    assert torch.equal(run(kit, batch), want), "off after an adapter is not the base"
    with kit.use("law"), kit.use(None):
        assert torch.equal(run(kit, batch), want)
    kit.use("law")
    assert kit.detach() is model
    assert torch.equal(run(model, batch), want)
    after = trace(model)
    for what, value in before.items():
        assert after[what] == value, f"detach left its mark on {what}"
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
