"""Models on the meta device: shapes without storage, so that sites are found before a weight is read.

It knows what keeps models from being built there, and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _LinspaceOnCpu(TorchFunctionMode):
    """timm takes its drop-path rates from `torch.linspace` while it builds: that one call needs real numbers."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules made inside have shapes and no storage."""
    with torch.device("meta"), _LinspaceOnCpu():
        yield
