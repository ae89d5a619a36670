"""torch.compile block by block: which call of a block runs as a graph, how many graphs there are, and what they took.

Each block is compiled with the program of the active route, in one frame of its own, so a graph is shared by all blocks
and adapters of the same shapes. Past the limit no graph is added: what fits one runs it, the rest runs as before. What
Dynamo cannot follow runs as before. It knows hooks and programs, and no method. Source: torch 2.13.
"""

from __future__ import annotations

import inspect
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from kitout import fast
from kitout.errors import ConfigError
from kitout.runtime.graphs.report import CompiledGraph, CompileReport, kind_of
from kitout.runtime.hooks.class_swap import ForwardFn
from kitout.runtime.state import KitState

RECOMPILE_MARGIN = 64  # Dynamo's own limit stays out of reach: past it a block would run as before without a word
LIMIT, FAILED, CACHE, HOOKS = (
    "past the limit", "torch.compile cannot follow it", "a cache that holds positions", "hooks on modules in the block",
)  # fmt: skip


def run_block(block: Any, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A block under the program of its hook: what is compiled."""
    if not torch.compiler.is_compiling():
        _CALL.missed = True  # Python runs this line where no graph fits and none is made
    program = block._kitout_hook.program
    if program is None:
        return forward(block, *args, **kwargs)
    return program(block, forward, args, kwargs)


class _Call(threading.local):
    """What this thread is calling."""

    graphs: BlockGraphs | None = None
    """Whose block; None outside of any call."""
    missed = False
    """No graph was run."""


_CALL = _Call()


class _CompileClock:
    """Counts and times what Dynamo compiles for the calls of blocks, by its callbacks.

    They are those of the process and run at the outermost compilation alone, one at a time.
    """

    def __init__(self) -> None:
        self.started = 0.0
        self.quiet = ExitStack()
        self.by_id: WeakValueDictionary[str, CompiledGraph] = WeakValueDictionary()  # compile_id of torch

    def register(self) -> None:
        from torch._dynamo.callback import callback_handler

        if self.end not in callback_handler.end_callbacks:  # torch._dynamo.reset() clears them
            callback_handler.register_start_callback(self.start)
            callback_handler.register_end_callback(self.end)

    def start(self, _: Any = None) -> None:
        self.started = time.perf_counter()
        if _CALL.graphs is not None:  # Dynamo's own reading of a tensor's .grad warns, as do its notes for developers
            self.quiet.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", UserWarning)

    def end(self, event: Any = None) -> None:
        """event: what was compiled; older versions of torch do not say, and backwards are then not counted."""
        seconds = time.perf_counter() - self.started
        self.quiet.close()
        if event is not None and event.callback_trigger.name != "DYNAMO":
            graph = self.by_id.get(event.compile_id)
            if graph is not None and event.callback_trigger.name == "LAZY_BACKWARD":
                graph.seconds += seconds
        elif _CALL.graphs is not None:
            graph = _CALL.graphs.add_graph(seconds)
            if event is not None:
                self.by_id[event.compile_id] = graph


_CLOCK = _CompileClock()


class _NewKeys:
    """In the place of a cache that holds nothing at a layer yet: keeps what the layer adds to it.

    A graph that reads the cache itself would be one of this layer alone, because it would depend on the layer's index.
    """

    added: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.added = keys, values
        return keys, values


@dataclass(frozen=True)
class _Block:
    """What is known of a block before it is called."""

    inner: tuple[nn.Module, ...]
    """The modules in it."""
    layer_index: int | None
    """Its layer in a cache; None where it says none."""

    @classmethod
    def of(cls, block: nn.Module) -> _Block:
        inner = tuple(module for module in block.modules() if module is not block)
        named = {module.__dict__.get("layer_idx") for module in (block, *inner)} - {None}
        return cls(inner, named.pop() if len(named) == 1 else None)

    def has_hooks(self) -> bool:
        return any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in self.inner
        )


class BlockGraphs:
    """The graphs of one kit's blocks, at most `limit` of them."""

    is_paused: bool
    """Everything runs as before."""
    needs_grad: bool
    """So does what records no gradient."""

    def __init__(self, state: KitState, paths: list[str], limit: int, options: Mapping[str, Any]) -> None:
        self.state, self.limit, self.is_paused, self.needs_grad = state, limit, False, False
        self.graphs: list[CompiledGraph] = []
        self.eager: Counter[str] = Counter()
        self._blocks = {path: _Block.of(state.base.get_submodule(path)) for path in paths}
        self._failed: set[tuple[type, str]] = set()  # class of block, kind
        self._warned: set[str] = set()  # kinds
        self._called: tuple[str, tuple[int, ...], bool] = ("", (), False)  # path, shape, whether a gradient is recorded
        # A code object of its own, because Dynamo keeps its graphs there: they go with this object.
        own = FunctionType(run_block.__code__.replace(), run_block.__globals__)
        torch_compile: Callable[..., Callable[..., Any]] = torch.compile
        self._dynamo_limit = {"recompile_limit": limit + RECOMPILE_MARGIN}
        if "recompile_limit" in inspect.signature(torch_compile).parameters:  # not before torch 2.13
            options, self._dynamo_limit = {**options, **self._dynamo_limit}, {}
        self._compiled = torch_compile(own, **options)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of a kit is not compiled
        return type(None), ()

    def report(self) -> CompileReport:
        return CompileReport(tuple(self.graphs), self.limit, dict(self.eager))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Everything runs as before meanwhile: what is called a few times pays for no graph."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def __call__(self, block: Any, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's forward under the active route, by a graph where it can."""
        if self.is_paused or not fast.enabled() or (self.needs_grad and not torch.is_grad_enabled()):
            return run_block(block, forward, args, kwargs)
        known, new_keys, call = self._blocks[block._kitout_hook.path], _NewKeys(), kwargs
        reason = HOOKS if known.has_hooks() else ""
        if kept := [name for name, value in kwargs.items() if not _is_plain(value)]:
            if kept == ["past_key_values"] and _is_empty(kwargs["past_key_values"], known.layer_index):
                call = {**kwargs, "past_key_values": new_keys}
            else:
                reason = CACHE
        if not all(map(_is_plain, args)):
            reason = CACHE
        if self._failed and (type(block), self._kind()) in self._failed:
            reason = FAILED
        if reason:
            self.eager[reason] += 1
            return run_block(block, forward, args, kwargs)
        try:
            output = self._run_graph(block, forward, args, call)
        except Exception as error:
            if not _is_refusal(error):
                raise
            output = run_block(block, forward, args, kwargs)  # an error of the call itself is raised here
            self._note_refusal(block, error)
            return output
        if new_keys.added is not None:
            kwargs["past_key_values"].update(*new_keys.added, known.layer_index)
        return output

    def _run_graph(self, block: Any, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As a graph, which may have to be made; past the limit by one there is, else as before."""
        shape = next((tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), ())
        self._called = block._kitout_hook.path, shape, torch.is_grad_enabled()
        _CLOCK.register()
        outer, _CALL.graphs, _CALL.missed = _CALL.graphs, self, False
        is_full = len(self.graphs) >= self.limit
        try:
            with torch.compiler.set_stance("eager_on_recompile") if is_full else self._raised_limit():
                output = self._compiled(block, forward, args, kwargs)
        finally:
            _CALL.graphs = outer
        if _CALL.missed:
            self._note_miss(is_full)
        return output

    def _raised_limit(self) -> AbstractContextManager[Any]:
        """Dynamo's own limit, which older versions of torch read from their config alone."""
        return torch._dynamo.config.patch(self._dynamo_limit) if self._dynamo_limit else nullcontext()

    def add_graph(self, seconds: float) -> CompiledGraph:
        """Dynamo has compiled a graph for the call in progress."""
        graph = CompiledGraph(self._kind(), repr(self.state.active.installed.route), *self._called, seconds)
        self.graphs.append(graph)
        return graph

    def _kind(self) -> str:
        return kind_of(self.state.active.installed.route, lambda name: type(self.state[name].method).__name__)

    def _note_miss(self, is_full: bool) -> None:
        self.eager[LIMIT if is_full else FAILED] += 1
        if not is_full or self._kind() in self._warned:
            return
        self._warned.add(self._kind())
        path, shape = self._called[0], " x ".join(map(str, self._called[1]))
        warnings.warn(
            f"kitout.compile: there are {len(self.graphs)} graphs, which is the limit, so {path} runs without one "
            f"under {self.state.active.installed.route!r} ({self._kind()}) with inputs of {shape}; "
            f"kitout.compile(kit, limit={2 * self.limit}) makes more, inputs of fewer shapes need fewer, and "
            "print(kitout.compiled(kit)) lists them",
            RuntimeWarning, stacklevel=2,
        )  # fmt: skip

    def _note_refusal(self, block: Any, error: Exception) -> None:
        """What cannot be followed is not tried again under routes of this kind."""
        reason = _first_line(error)
        self._failed.add((type(block), self._kind()))
        self.eager[FAILED] += 1
        if self.graphs and self.graphs[-1].block == self._called[0] and self.graphs[-1].kind == self._kind():
            self.graphs[-1].error = reason
        warnings.warn(
            f"kitout.compile: torch.compile cannot follow {self._called[0]} under "
            f"{self.state.active.installed.route!r} ({self._kind()}), so it runs without a graph: {reason}",
            RuntimeWarning, stacklevel=2,
        )  # fmt: skip


def _is_plain(value: Any) -> bool:
    """Nothing that may keep what a block computes, or that a graph would have to follow into other code."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (Tensor, str, int, float, torch.dtype, torch.device, type(None)))


def _is_empty(cache: Any, layer_index: int | None) -> bool:
    """A growing cache that holds nothing at this layer: what it returns there is what it is given."""
    from transformers.cache_utils import DynamicCache

    return layer_index is not None and type(cache) is DynamicCache and not int(cache.get_seq_length(layer_index))


def _is_refusal(error: Exception) -> bool:
    """Dynamo could not follow the code. ConfigError where the backend failed."""
    from torch._dynamo import exc

    module = type(error).__module__
    if isinstance(error, exc.BackendCompilerFailed) or module.startswith("torch._inductor"):
        raise ConfigError(
            f"kitout.compile: the backend failed ({_first_line(error)}); choose another one, such as "
            'kitout.compile(kit, backend="aot_eager"), or none: kitout.compile(kit, disable=True), train.compile=off'
        ) from error
    return module.startswith("torch._dynamo")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
