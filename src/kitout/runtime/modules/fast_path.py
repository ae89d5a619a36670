"""torch's fast path of an encoder layer, which runs none of the layer's modules: avoided where one has a program.

In eval mode `nn.TransformerEncoderLayer` computes itself in one fused call from the parameters of its parts. Such a
layer with an adapter inside runs part by part; without one it stays as fast, and bit-identical. Source: torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from kitout.runtime.hooks.class_swap import ForwardFn

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


class _ModulesRun(TorchFunctionMode):
    """Changes nothing. While any such mode is active, torch takes no fast path, in this thread alone."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class WithoutFastPath:
    """The program of such a layer. inner: its own program."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _ModulesRun():
            return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)


def layers_around(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Paths of the layers with a fast path around these modules."""
    layers = [path for path, module in model.named_modules() if path and isinstance(module, LAYERS)]
    return [layer for layer in layers if any(path.startswith(f"{layer}.") for path in paths)]
