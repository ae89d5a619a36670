"""eval_mode: a model in eval mode, with a gradient mode and a private random state, all restored afterwards.

One context for whoever runs a model without training it: the probe, evaluation, and what a run measures between steps.
Training modes are restored by module, so that blocks in a mode of their own keep it. It knows modules, no kit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(*models: nn.Module, grad: bool = False, freeze: bool = False) -> Iterator[None]:
    """All modules of the models in eval mode; random numbers drawn inside do not change the global random state.

    grad: gradients are recorded, even inside `torch.inference_mode`; without it they are not.
    freeze: no parameter requires a gradient, so that with `grad` only activations get one.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    parameters = [parameter for model in models for parameter in model.parameters()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in parameters] if freeze else []
    devices = list({parameter.device for parameter in parameters if parameter.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if grad:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        try:
            if any(mode for _, mode in modes):  # walks over a large model take longer than a small batch of it
                for model in models:
                    model.eval()
            if freeze:
                for parameter, value in requires_grad:
                    if value:  # one by one where it changes something: walks over a large model take long
                        parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in modes:
                if module.training is not mode:
                    module.training = mode
            for parameter, value in requires_grad:
                if parameter.requires_grad is not value:
                    parameter.requires_grad_(value)
