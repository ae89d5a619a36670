"""Which route a recorded graph was made under, for activation checkpointing that hands a block nothing but its input.

A forward leaves a mark in the graph of its outputs; backward passes it before it reaches any block, so a recomputation
in the same pass knows its forward. The mark lives as long as the graph does. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from kitout.errors import RouteError

T = TypeVar("T")


class _Forward(Generic[T]):
    """One recorded forward; only its graph holds it."""

    __slots__ = ("__weakref__", "made_under")

    def __init__(self, made_under: T) -> None:
        self.made_under = made_under


class Graphs(Generic[T]):
    """The graphs that may still be run backward."""

    def __init__(self) -> None:
        self._alive: WeakSet[_Forward[T]] = WeakSet()
        self._entered: tuple[int, T] | None = None  # the backward pass in progress, and what it reached last

    def __reduce__(self) -> tuple[Any, ...]:  # graphs do not travel
        return Graphs, ()

    def record(self, output: Any, made_under: T) -> None:
        """A forward under a route has given this output."""
        forward = _Forward(made_under)
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                self._alive.add(forward)
                tensor.grad_fn.register_prehook(self._enter(forward))

    def _enter(self, forward: _Forward[T]) -> Any:
        def hook(_: Any) -> None:
            self._entered = torch._C._current_graph_task_id(), forward.made_under

        return hook

    def recomputed(self) -> T | None:
        """The route of the recomputation in progress; None if no forward is known; RouteError where it could be two."""
        if self._entered is not None and self._entered[0] == torch._C._current_graph_task_id():
            return self._entered[1]
        pending = {id(f.made_under): f.made_under for f in list(self._alive)}
        if len(pending) > 1:
            raise RouteError(
                "activation checkpointing recomputes a block, but forwards under different adapters are pending and "
                "neither this model's checkpointing nor its outputs say which one this is: call backward() after each "
                "forward, from its outputs, and run forwards that need no backward under torch.no_grad()"
            )
        return next(iter(pending.values()), None)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
