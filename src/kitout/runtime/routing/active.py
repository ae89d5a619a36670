"""The active route of one attached model: which programs its hooks run right now, and who may change that.

A compiled route is a list of programs for hooks; installing it costs one attribute write per site. The sticky route
holds for everybody; a `with` route belongs to its context (thread, task). Either is installed at the model boundary,
under a lock that lasts for one forward. It knows nothing of adapters or methods.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from kitout.errors import ForkedModel
from kitout.route import Average, Route, adapter_names
from kitout.runtime.hooks.class_swap import Hook, Program
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.output_width import OutputWidth
from kitout.runtime.routing.calls import CallsInProgress
from kitout.runtime.routing.recompute import PendingGraphs
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot, ForwardState

MAX_STICKY = 256  # sticky choices that are remembered, should the later ones be entered by a `with` after all
# How another thread waits for a `with` that may follow a `use`. Many short waits and not a long one: where threads
# compete for the interpreter, or the machine stands still, each wait takes longer, and so the other one gets its turns.
WAITS_TO_ENTER, SECONDS_PER_WAIT = 50, 0.005


@dataclass(eq=False)
class CompiledRoute:
    """A route compiled for one model."""

    route: Route
    programs: list[tuple[Hook, Program]] = field(default_factory=list)
    """What each hook runs."""
    num_rows: int | None = None
    """The rows the route names; None: it fits any batch."""
    average: Average | None = None
    """How the outputs of its rows, which are then copies of every row of the call, are averaged."""
    row_plan: RowPlan | None = None
    """Which row has which entry; None where all have the same."""
    media_plan: RowPlan | None = None
    """The same for modules that see images or sounds beside a text; None where no program needs it."""
    output_width: OutputWidth | None = None
    """What its heads make of the width that the model's config says; None where it stays."""
    forward_slot: ForwardSlot | None = None
    """Where the programs find the state of the forward in progress; None where they need none."""
    forward_state: ForwardState = field(default_factory=ForwardState)
    """The state of one forward."""

    def for_new_forward(self, positions_from_generate: bool = False) -> CompiledRoute:
        """The same with a state of its own."""
        if self.forward_slot is None:
            return self
        return replace(self, forward_state=ForwardState(positions_from_generate=positions_from_generate))


class RouteActivation:
    """One call of `use`, as an object of its own so that entering it as a `with` takes exactly it."""

    __slots__ = ("handle", "order", "route")

    def __init__(self, route: Route, handle: Callable[[], object] | None = None) -> None:
        self.route = route
        self.handle = handle  # a weak reference to what `use` returned, while that may still be entered
        self.order = 0  # the number of this choice among all of its model


class WithBlock:
    """One `with` in progress: a choice, in the context that entered it and in those copied from it since."""

    __slots__ = ("__weakref__", "choice", "has_ended", "outer", "thread", "token")

    def __init__(self, choice: RouteActivation, outer: WithBlock | None) -> None:
        self.choice, self.outer = choice, outer
        self.thread = threading.current_thread()
        self.token: Token[WithBlock | None] | None = None
        self.has_ended = False  # out of order or from another context: those that still have it pass it over


class _LockOfAnotherProcess:
    """In the place of a lock that a thread of the parent process held when it forked: nobody will release it."""

    def __enter__(self) -> None:
        raise ForkedModel(
            "this process was forked while another thread was inside a call of this model, which stays half done here: "
            "fork while no thread runs the model, start processes by 'spawn' or 'forkserver', or load the model in "
            "the new process"
        )

    def __exit__(self, *_: object) -> None: ...


class ActiveRoute:
    """The state shared by a kit, its model boundary and its blocks.

    A choice made by `use` is pending at first: only its own thread sees it, because a `with` may be about to enter it.
    It becomes sticky at that thread's next call into the kit, or as soon as another thread without a choice of its own
    resolves a route. That thread waits a moment, and not at all if nobody holds the handle any more. So what a program
    does with the handle never decides for how long or for whom the choice holds.
    """

    _all: WeakSet[ActiveRoute] = WeakSet()  # of this process

    def __init__(self) -> None:
        self.installed = CompiledRoute(None)
        self.sticky: list[RouteActivation] = []  # in the order they were chosen: the last one holds
        self.pending: dict[int, RouteActivation] = {}  # by thread
        self.num_choices = 0
        self.graphs: PendingGraphs[CompiledRoute] = PendingGraphs()
        self._make_unshared()

    def _make_unshared(self) -> None:
        # Of what is installed: held for a whole forward.
        self.lock: Any = threading.RLock()
        self.choices = threading.Condition()  # of sticky, pending and with_blocks: never held for long
        self.calls = CallsInProgress()
        self.with_blocks: WeakSet[WithBlock] = WeakSet()  # in progress, in any context
        # By cache: how many positions lay before each row's text when it was filled.
        self.cache_prefix_lengths: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()
        self.innermost: ContextVar[WithBlock | None] = ContextVar("kitout_route", default=None)
        ActiveRoute._all.add(self)

    def __getstate__(self) -> dict[str, Any]:  # what belongs to threads and contexts neither pickles nor deepcopies
        self.make_sticky()
        unshared = ("lock", "choices", "calls", "with_blocks", "innermost", "cache_prefix_lengths")
        kept = {name: value for name, value in self.__dict__.items() if name not in unshared}
        return kept | {"pending": {}, "installed": self.installed.for_new_forward()}  # a forward's graph is not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_unshared()

    @staticmethod
    def after_fork() -> None:
        """In a new process: only the thread that forked has come along."""
        for active in ActiveRoute._all:
            active.choices, active.graphs.lock = threading.Condition(), threading.Lock()
            if isinstance(active.lock, _LockOfAnotherProcess):
                continue
            if active.lock.acquire(blocking=False):
                active.lock.release()
            else:
                active.lock = _LockOfAnotherProcess()

    # ---- choices -----------------------------------------------------------------------------------------------

    @property
    def route(self) -> Route:
        """What is active in this context: its own `with` route, else its thread's last choice, else the sticky one."""
        block = self._innermost_in_progress()
        if block is not None:
            return block.choice.route
        choice = self.pending.get(threading.get_ident())
        return self.sticky_route if choice is None else choice.route

    def _innermost_in_progress(self) -> WithBlock | None:
        block = self.innermost.get()
        while block is not None and block.has_ended:
            block = block.outer
        return block

    @property
    def sticky_route(self) -> Route:
        """The route of threads without a choice of their own."""
        if self.pending:
            self._await_others()
        with self.choices:
            return self.sticky[-1].route if self.sticky else None

    def choose(self, choice: RouteActivation) -> None:
        """Makes a choice pending for this thread."""
        with self.choices:
            self.make_sticky()
            self.num_choices += 1
            choice.order = self.num_choices
            self.pending[threading.get_ident()] = choice

    def make_sticky(self) -> None:
        """Makes this thread's last choice, which no `with` has entered, hold for everybody."""
        if threading.get_ident() in self.pending:
            with self.choices:
                self._make_sticky(threading.get_ident())

    def _make_sticky(self, thread: int) -> None:
        choice = self.pending.pop(thread, None)
        if choice is not None:
            choice.handle = None
            insort(self.sticky, choice, key=lambda c: c.order)
            del self.sticky[:-MAX_STICKY]
            self.choices.notify_all()

    def _await_others(self) -> None:
        """Gives other threads the time to enter what they chose; what they have not entered by then is sticky."""
        own, waits, latest = threading.get_ident(), 0, time.monotonic()
        with self.choices:
            for thread, choice in [item for item in self.pending.items() if item[0] != own]:
                while self.pending.get(thread) is choice:
                    if waits == WAITS_TO_ENTER or choice.handle is None or choice.handle() is None:
                        self._make_sticky(thread)
                        continue
                    self.choices.wait(SECONDS_PER_WAIT)
                    if time.monotonic() - latest >= SECONDS_PER_WAIT:  # not only another choice's notification
                        waits, latest = waits + 1, time.monotonic()

    def enter(self, choice: RouteActivation) -> WithBlock:
        """A `with` makes a choice its own; nobody else has it from now on."""
        block = WithBlock(choice, self._innermost_in_progress())
        with self.choices:
            self.pending = {thread: c for thread, c in self.pending.items() if c is not choice}
            self.sticky = [c for c in self.sticky if c is not choice]
            self.with_blocks.add(block)
            self.choices.notify_all()
        block.token = self.innermost.set(block)
        return block

    def leave(self, blocks: list[WithBlock]) -> bool:
        """One of the `with` blocks of a handle has ended; whether the route of this context may be another now.

        That of this context, if it has one. A generator's block may be left from another context, in whatever thread
        collects it as garbage. Where several contexts share the handle, nobody knows whose it was: one of a thread
        that is over, else none, and it ends with its thread.
        """
        innermost = block = self.innermost.get()
        while block is not None and block not in blocks:
            block = block.outer
        is_here = block is not None
        if block is None:
            over = blocks if len(blocks) == 1 else [b for b in blocks if not b.thread.is_alive()]
            if not over:
                return False
            block = over[0]
        blocks.remove(block)
        with self.choices:
            self.with_blocks.discard(block)
        block.has_ended = not (block is innermost and self._reset(block))
        block.token = None
        return is_here

    def _reset(self, block: WithBlock) -> bool:
        """Makes the route before a `with` that of this context again; False in another than the one that entered it."""
        assert block.token is not None
        try:
            self.innermost.reset(block.token)
        except ValueError:
            return False
        return True

    def is_used(self, name: str) -> bool:
        """Whether an adapter is active here, in any `with`, or by the sticky route."""
        self.make_sticky()
        with self.choices:
            in_blocks = [block.choice.route for block in self.with_blocks if block.thread.is_alive()]
        return any(name in adapter_names(route) for route in (self.route, self.sticky_route, *in_blocks))

    def forget(self, name: str) -> None:
        """Drops earlier choices of an adapter that goes: leaving a later one must not bring them back."""
        with self.choices:
            self.sticky = [c for c in self.sticky if name not in adapter_names(c.route)]

    # ---- what is installed -------------------------------------------------------------------------------------

    def install(self, compiled: CompiledRoute) -> None:
        """Puts the programs of a compiled route on the hooks."""
        if compiled.forward_slot is not None:
            compiled.forward_slot.state = compiled.forward_state
        if compiled.programs is self.installed.programs:
            self.installed = compiled
            return
        for hook, _ in self.installed.programs:
            hook.program = None
        for hook, program in compiled.programs:
            hook.program = program
        self.installed = compiled

    @contextmanager
    def prefill(self, compiled: CompiledRoute) -> Iterator[None]:
        """Part of the model is run for its keys and values alone, under a route of its own and as no forward."""
        before = self.installed
        compiled.forward_state.is_prefill = True
        self.install(compiled)
        if torch.compiler.is_compiling():  # the boundary is not in the graph
            yield
            self.install(before)
            return
        self.calls.prefills += 1
        try:
            yield
        finally:
            self.calls.prefills -= 1
            self.install(before)

    @contextmanager
    def restored(self, compiled: CompiledRoute) -> Iterator[None]:
        """The route a graph was recorded under, for the time its activations are recomputed (any thread)."""
        with self.lock:
            before = self.installed
            self.install(compiled)
            self.calls.forwards += 1
            try:
                yield
            finally:
                self.calls.forwards -= 1
                self.install(before)


if os.name == "posix":
    os.register_at_fork(after_in_child=ActiveRoute.after_fork)
