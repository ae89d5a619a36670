"""Which route a recorded graph was made under, for activation checkpointing that hands a block nothing but its input.

A forward leaves a mark in the graph of its outputs; backward passes it before it reaches any block, so a recomputation
in the same pass knows its forward. Several passes may run at once, each in one thread or more, so marks are kept by
pass. A mark lives as long as its graph does. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Variable

from kitout.errors import RouteError

T = TypeVar("T")


class _RecordedForward(Generic[T]):
    """One recorded forward; only its graph holds it."""

    __slots__ = ("__weakref__", "route")

    def __init__(self, route: T) -> None:
        self.route = route


class PendingGraphs(Generic[T]):
    """The recorded graphs that may still be run backward."""

    def __init__(self) -> None:
        self._alive: WeakSet[_RecordedForward[T]] = WeakSet()
        self.lock = Lock()
        # By backward pass in progress: the forward that it reached last.
        self._last_reached: WeakValueDictionary[int, _RecordedForward[T]] = WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:  # graphs do not travel
        return PendingGraphs, ()

    def record(self, output: Any, route: T) -> None:
        """A forward under a route has given this output."""
        forward = _RecordedForward(route)
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                with self.lock:
                    self._alive.add(forward)
                tensor.grad_fn.register_prehook(self._enter(forward))

    def _enter(self, forward: _RecordedForward[T]) -> Any:
        def hook(_: Any) -> None:
            backward = torch._C._current_graph_task_id()
            with self.lock:
                is_new = backward not in self._last_reached
                self._last_reached[backward] = forward
            if is_new:
                Variable._execution_engine.queue_callback(partial(self._forget, backward))

        return hook

    def _forget(self, backward: int) -> None:
        """A backward pass has ended."""
        with self.lock:
            self._last_reached.pop(backward, None)

    def reached(self) -> T | None:
        """The route of the forward that the backward pass in progress has reached last; None outside of any."""
        with self.lock:
            forward = self._last_reached.get(torch._C._current_graph_task_id())
        return None if forward is None else forward.route

    def route_of_recomputation(self) -> T | None:
        """The route of the recomputation in progress; None if no forward is known; RouteError where it could be two."""
        reached = self.reached()
        if reached is not None:
            return reached
        with self.lock:
            pending = {id(f.route): f.route for f in self._alive}
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
