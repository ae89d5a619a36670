"""`attach(model)`: from any model whose blocks can be found to a kit on it.

Finds, proves, then hands over to `Kit`. It knows no method and no architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kitout.base.find import survey
from kitout.base.probe import prove
from kitout.errors import AlreadyAttached, KitoutError
from kitout.kit.kit import Kit


def attach(
    model: nn.Module, *, roles: Mapping[str, str] | None = None, example: Mapping[str, Any] | None = None
) -> Kit:
    """A kit on a transformers model, timm ViT or any nn.Module whose blocks can be found (or are given by `roles`).

    Freezes the model and changes nothing else. roles: regex on the module path -> role, where the finder needs help.
    example: one batch as the model takes it, where a probe input cannot be made up from the model's config.
    Raises NoBlocks, TargetError, AlreadyAttached.
    """
    if not isinstance(model, nn.Module):
        raise KitoutError(f"attach() takes an nn.Module, found {type(model).__name__}")
    if isinstance(model, Kit):
        raise AlreadyAttached("this is a kit: attach() takes the bare model")
    if "_kitout" in model.__dict__:
        raise AlreadyAttached("this model already wears a kit: use that one, or kit.detach() first")
    worn = [path for path, m in model.named_modules() if "_kitout_tap" in m.__dict__ or "_kitout" in m.__dict__]
    if worn:
        raise AlreadyAttached(f"{worn[0] or 'this module'} is part of a model that wears a kit: kit.detach() first")
    return Kit(model, prove(survey(model, roles), example))
