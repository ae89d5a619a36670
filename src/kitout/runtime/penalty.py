"""What the active adapters add to a loss (`Delta.penalty`), and the losses that it joins by itself.

A model called with labels computes its own loss, which a trainer takes from the output: there the penalty joins,
in a training forward. A loss that is made of logits is out of sight, and takes `kit.penalty()`. It knows routes,
adapters and outputs, and no trainer but for the number of targets that transformers' divides a loss by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kitout.route import adapter_names
from kitout.runtime.state import KitState
from kitout.runtime.untrained_loss import explain_backward

IGNORED = -100  # the label of no target


def active_penalty(state: KitState) -> Tensor | None:
    """The sum over the active adapters that are trained; of those of some rows of a batch, by their share of it."""
    entries = state.route if isinstance(state.route, tuple) else (state.route,)
    rows = Counter(name for entry in entries for name in state.names_with_parts(adapter_names(entry)))
    terms = []
    for name, count in rows.items():
        if name in state and any(value.requires_grad for value in state[name].parameters()):
            penalty = state[name].penalty()
            terms += [] if penalty is None else [penalty * (count / len(entries))]
    return torch.stack(terms).sum() if terms else None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the route is no part of a graph
def finish_loss(state: KitState, output: Any, kwargs: Mapping[str, Any]) -> Any:
    """The output of a kit's forward, called with these keywords: in training, its loss is complete or says why not."""
    output = explain_backward(state, output)
    if not state.modules.training or not torch.is_grad_enabled():
        return output
    is_tuple = isinstance(output, tuple) and bool(output) and kwargs.get("labels") is not None
    loss = output[0] if is_tuple else output.get("loss") if isinstance(output, dict) else None
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        return output
    penalty = active_penalty(state)
    if penalty is None:
        return output
    loss = loss + (penalty * _share_of_step(state, kwargs)).to(loss)
    if is_tuple:
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def _share_of_step(state: KitState, kwargs: Mapping[str, Any]) -> Any:
    """The share of a step's targets that this call has, where its loss is one too (transformers gives their number)."""
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or labels is None:
        return 1.0
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    shifts = LOSS_MAPPING.get(getattr(state.base, "loss_type", None)) is ForCausalLMLoss
    if kwargs.get("shift_labels") is not None:
        labels = kwargs["shift_labels"]
    elif shifts and not getattr(state.config, "is_encoder_decoder", False):
        labels = labels[..., 1:]  # as transformers counts them
    return labels.ne(IGNORED).sum() / total
