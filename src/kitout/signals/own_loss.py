"""The loss and the trained positions of batches as transformers has them: mappings that the model is called with.

It knows the usual names of inputs and labels, and no task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kitout.errors import ConfigError
from kitout.kit import Kit

IGNORED = -100  # a label without a target


def own_loss(kit: Kit, batch: Any) -> Tensor:
    """The model's own loss. ConfigError where it gives none."""
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"signals: a batch is a {type(batch).__name__}, so the model has no loss of its own for it: give "
            "loss=lambda kit, batch: ..."
        )
    output = kit(**batch)
    value = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(value, Tensor):
        raise ConfigError("signals: the model gives no loss for this batch: put labels in it, or give loss=...")
    return value


def own_positions(batch: Any) -> list[Tensor]:
    """Where a token has a label, as in PEFT's EVA; where labels are not by token, where it is no padding."""
    if not isinstance(batch, Mapping):
        return []
    labels, padding = batch.get("labels"), batch.get("attention_mask")
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    masks: list[Tensor] = []
    if isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape:
        masks.append(labels.ne(IGNORED))
    if isinstance(padding, Tensor) and padding.ndim == 2:
        padding = padding.bool()
        masks = [masks[0] & padding] if masks and masks[0].shape == padding.shape else [*masks, padding]
    return masks
