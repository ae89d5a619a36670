"""The active route of one attached model: which programs its hooks run right now, and who may change that.

A compiled route is a list of programs for hooks; installing it costs one attribute write per site. The sticky route
holds for everybody; a `with` route belongs to its context (thread, task). Either is installed at the model boundary,
under a lock that lasts for one forward. It knows nothing of adapters or methods.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from kitout.runtime.hooks.class_swap import Hook, Program
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.output_width import OutputWidth
from kitout.runtime.routing.recompute import PendingGraphs
from kitout.runtime.routing.route import Route, adapter_names
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot, ForwardState

MAX_STICKY = 256  # sticky choices that are remembered, should the later ones be entered by a `with` after all
SECONDS_TO_ENTER = 0.05  # how long another thread waits for a `with` that may follow a `use`


@dataclass(eq=False)
class CompiledRoute:
    """A route compiled for one model."""

    route: Route
    programs: list[tuple[Hook, Program]] = field(default_factory=list)
    """What each hook runs."""
    num_rows: int | None = None
    """The rows the route names; None: it fits any batch."""
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

    def for_new_forward(self) -> CompiledRoute:
        """The same with a state of its own."""
        return self if self.forward_slot is None else replace(self, forward_state=ForwardState())


class RouteActivation:
    """One call of `use`, as an object of its own so that leaving a `with` removes exactly it."""

    __slots__ = ("handle", "order", "route")

    def __init__(self, route: Route, handle: Callable[[], object] | None = None) -> None:
        self.route = route
        self.handle = handle  # a weak reference to what `use` returned, while that may still be entered
        self.order = 0  # the number of this choice among all of its model


class ActiveRoute:
    """The state shared by a kit, its model boundary and its blocks.

    A choice made by `use` is pending at first: only its own thread sees it, because a `with` may be about to enter it.
    It becomes sticky at that thread's next call into the kit, or as soon as another thread without a choice of its own
    resolves a route. That thread waits for at most SECONDS_TO_ENTER, and not at all if nobody holds the handle any
    more. So what a program does with the handle never decides for how long or for whom the choice holds.
    """

    def __init__(self) -> None:
        self.installed = CompiledRoute(None)
        self.sticky: list[RouteActivation] = []  # in the order they were chosen: the last one holds
        self.pending: dict[int, RouteActivation] = {}  # by thread
        self.num_choices = 0
        self.in_with_blocks: Counter[str] = Counter()  # by adapter: how many `with` blocks it is active in
        self.depth = 0  # > 0 inside a forward that crossed the model boundary, or a recomputation whose route is known
        self.generating = 0  # > 0 inside generate, where beams multiply the rows
        self.caller_gave_no_positions = True  # inside generate: its caller gave no positions
        self.prefilling = 0  # > 0 while a prompt is run before its text
        self.graphs: PendingGraphs[CompiledRoute] = PendingGraphs()
        self._make_unshared()

    def _make_unshared(self) -> None:
        self.lock = threading.RLock()  # of what is installed: held for a whole forward
        self.choices = threading.Condition()  # of sticky, pending and in_with_blocks: never held for long
        # By cache: how many positions lay before each row's text when it was filled.
        self.cache_prefix_lengths: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()
        self.context_choice: ContextVar[RouteActivation | None] = ContextVar("kitout_route", default=None)

    def __getstate__(self) -> dict[str, Any]:  # locks and context variables neither pickle nor deepcopy
        self.make_sticky()
        unshared = ("lock", "choices", "context_choice", "cache_prefix_lengths")
        return {k: v for k, v in self.__dict__.items() if k not in unshared} | {"pending": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_unshared()

    # ---- choices -----------------------------------------------------------------------------------------------

    @property
    def route(self) -> Route:
        """What is active in this context: its own `with` route, else its thread's last choice, else the sticky one."""
        choice = self.context_choice.get() or self.pending.get(threading.get_ident())
        return self.sticky_route if choice is None else choice.route

    @property
    def sticky_route(self) -> Route:
        """The route of threads without a choice of their own."""
        if self.pending:
            self._await_others()
        with self.choices:
            return self.sticky[-1].route if self.sticky else None

    @property
    def positions_from_generate(self) -> bool:
        """Whether `position_ids` come from `generate`, which counts them from the mask, and not from a caller."""
        return self.generating > 0 and self.caller_gave_no_positions

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
        latest = time.monotonic() + SECONDS_TO_ENTER
        own = threading.get_ident()
        with self.choices:
            for thread, choice in [item for item in self.pending.items() if item[0] != own]:
                while self.pending.get(thread) is choice:
                    remaining = latest - time.monotonic()
                    if remaining <= 0 or choice.handle is None or choice.handle() is None:
                        self._make_sticky(thread)
                    else:
                        self.choices.wait(remaining)

    def enter(self, choice: RouteActivation) -> None:
        """A `with` makes a choice its own; nobody else has it from now on."""
        with self.choices:
            self.pending = {thread: c for thread, c in self.pending.items() if c is not choice}
            self.sticky = [c for c in self.sticky if c is not choice]
            self.in_with_blocks.update(set(adapter_names(choice.route)))
            self.choices.notify_all()

    def leave(self, choice: RouteActivation) -> None:
        """A `with` has ended."""
        with self.choices:
            self.in_with_blocks.subtract(set(adapter_names(choice.route)))

    def is_used(self, name: str) -> bool:
        """Whether an adapter is active here, in any `with`, or by the sticky route."""
        self.make_sticky()
        in_routes = {*adapter_names(self.route), *adapter_names(self.sticky_route)}
        return name in in_routes or self.in_with_blocks[name] > 0

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
        self.install(compiled)
        self.prefilling += 1
        try:
            yield
        finally:
            self.prefilling -= 1
            self.install(before)

    @contextmanager
    def restored(self, compiled: CompiledRoute) -> Iterator[None]:
        """The route a graph was recorded under, for the time its activations are recomputed (any thread)."""
        with self.lock:
            before = self.installed
            self.install(compiled)
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1
                self.install(before)
