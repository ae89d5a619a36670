"""The scalars of a reward or value adapter, whose head stands in the place of the output head.

A scalar is read where the head gives it: nothing that a model does to logits (a soft cap, a scale) touches it, and no
logits of the vocabulary are computed on the way. How such a head begins is `kitout.align.scalar_head`'s business. It
knows no losses, no data and no roles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kitout.errors import ConfigError, RouteError
from kitout.kit import Kit
from kitout.route import Route
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.lm_head_loss import ENCODER, output_head, replaced_forward


def head_path(kit: Kit) -> str:
    """The path of the model's own output head, in whose place a scalar head stands.

    ConfigError for an encoder-decoder, an encoder, or a model without a linear output head.
    """
    name = type(kit.base).__name__
    if getattr(kit.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{name} is an encoder-decoder: rewards, values and policies are read off one sequence of prompt and "
            "answer, so take a decoder (AutoModelForCausalLM)"
        )
    head = output_head(kit)
    if head is None:
        raise ConfigError(
            f"{name} names no linear output head (get_output_embeddings), in whose place a scalar head would stand: "
            "load the model as a language model (AutoModelForCausalLM)"
        )
    if any(tower.causal is False for tower in kit.survey.towers):
        raise ConfigError(ENCODER.format(name=name))
    return next(path for path, module in kit.base.named_modules() if module is head)


def head_width(kit: Kit, route: Route) -> int | None:
    """What the heads of this route make of the output's width: 1 for a scalar head; None: the vocabulary's own."""
    width = kit.state.compile(route).output_width
    return None if width is None or width.name != "vocab_size" else width.width


def scalars(run_model: Callable[[], Any], kit: Kit) -> Tensor:
    """The scalar at every position under the active route, [B, T], in float32 or better and with its gradient.

    run_model(): calls the kit, or what wraps it, once over [B, T] tokens. What it returns is not read. Under rows every
    row needs a scalar head. RouteError where the active route has none.
    """
    path = head_path(kit)
    if head_width(kit, kit.active) != 1:
        raise RouteError(f"{kit.active!r} has no scalar head at {path}: {how_to_add(kit)}")
    head = kit.base.get_submodule(path)
    run_head, found = head.forward, list[Tensor]()

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        values = run_head(*args, **kwargs)
        found.append(at_least_float32(values.squeeze(-1)))
        zeros = values.new_zeros(1, 1, 1)
        return zeros + 0.0 * values.sum()  # DistributedDataParallel follows the graph from the model's output

    with replaced_forward(head, forward):
        run_model()
    return found[0]


def last_scalars(run_model: Callable[[], Any], kit: Kit, attention_mask: Tensor) -> Tensor:
    """`scalars` at the last real token of each row, [B]. attention_mask: [B, T], padded on either side."""
    values = scalars(run_model, kit)
    return values.gather(1, last_tokens(attention_mask)[:, None])[:, 0]


def last_tokens(attention_mask: Tensor) -> Tensor:
    """The column of each row's last real token, [B], of a mask [B, T] padded on either side."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return ((attention_mask != 0) * columns).argmax(1)


def how_to_add(kit: Kit) -> str:
    """What to write for an adapter with a scalar head."""
    return f"kit.add(name, method, heads={{{head_path(kit)!r}: scalar_head(kit, seed=0)}})"
