"""The live route of one attached model: what its taps run right now, and who may change it.

A route compiled for a model is a `Bound`: programs to lay on taps. Laying it costs one attribute write per site.
The sticky route is plain state; a `with` route belongs to its context (thread, task) and is laid at the model
boundary, under a lock that lasts for one forward. Until it is known whether a choice will be entered by a `with`, only
the thread that made it sees it. It knows nothing of adapters or methods.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from kitout.runtime.hooks.class_swap import Hook, Program
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.routing.recompute import PendingGraphs
from kitout.runtime.routing.route import Route, adapter_names
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot, ForwardState


@dataclass(eq=False)
class CompiledRoute:
    """A compiled route: programs by tap, the number of rows it names (None: any batch) and who wears what in them.

    here: where its programs find the Call in progress, None where they need none. call: that of one forward.
    """

    route: Route
    programs: list[tuple[Hook, Program]] = field(default_factory=list)
    num_rows: int | None = None
    row_plan: RowPlan | None = None
    forward_slot: ForwardSlot | None = None
    forward_state: ForwardState = field(default_factory=ForwardState)

    def for_new_forward(self) -> CompiledRoute:
        """For one forward of its own."""
        return self if self.forward_slot is None else replace(self, forward_state=ForwardState())


class RouteActivation:
    """One call of `use`, as an object of its own so that leaving a `with` removes exactly it."""

    __slots__ = ("route",)

    def __init__(self, route: Route) -> None:
        self.route = route


class ActiveRoute:
    """The state shared by a kit, its model boundary and its blocks."""

    def __init__(self) -> None:
        self.installed = CompiledRoute(None)
        self.sticky: deque[RouteActivation] = deque([RouteActivation(None)], maxlen=256)
        self.pending: dict[int, RouteActivation] = {}  # by thread: chosen, but not yet known to be sticky
        self.in_with_blocks: Counter[str] = Counter()  # adapters by the number of `with` blocks that wear them
        self.depth = 0  # > 0 inside a forward that crossed the model boundary, or a recomputation whose route is known
        self.generating = 0  # > 0 inside generate, where beams multiply the rows
        self.caller_gave_no_positions = True  # inside generate: its caller gave no positions
        self.prefilling = 0  # > 0 while a prompt is run ahead of its text
        self.graphs: PendingGraphs[CompiledRoute] = PendingGraphs()
        self._make_unshared()

    def _make_unshared(self) -> None:
        self.lock = threading.RLock()
        # By cache: how many positions lay in front of each row's text when it was filled.
        self.cache_prefix_lengths: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()
        self.context_choice: ContextVar[RouteActivation | None] = ContextVar("kitout_route", default=None)

    def __getstate__(self) -> dict[str, Any]:  # locks and context variables neither pickle nor deepcopy
        self.make_sticky()
        return {k: v for k, v in self.__dict__.items() if k not in ("lock", "context_choice", "cache_prefix_lengths")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_unshared()

    @property
    def route(self) -> Route:
        """What this context wears: its own `with` route, else its thread's last choice, else the sticky one."""
        choice = self.context_choice.get() or self.pending.get(threading.get_ident()) or self.sticky[-1]
        return choice.route

    @property
    def positions_from_generate(self) -> bool:
        """Whether `position_ids` come from `generate`, which counts them from the mask, and not from a caller."""
        return self.generating > 0 and self.caller_gave_no_positions

    def make_sticky(self, thread: int | None = None) -> None:
        """A thread's last choice (default: this thread's) was not entered by a `with`: it holds for everybody."""
        choice = self.pending.pop(threading.get_ident() if thread is None else thread, None)
        if choice is not None:
            self.sticky.append(choice)

    def forget(self, name: str) -> None:
        """Earlier choices that wear an adapter which goes: leaving a later one must not bring them back."""
        kept = [c for c in self.sticky if name not in adapter_names(c.route)]
        self.sticky.clear()
        self.sticky.extend(kept)

    def install(self, compiled: CompiledRoute) -> None:
        """Puts a compiled route on the taps."""
        if compiled.forward_slot is not None:
            compiled.forward_slot.state = compiled.forward_state
        if compiled.programs is self.installed.programs:
            self.installed = compiled
            return
        for tap, _ in self.installed.programs:
            tap.program = None
        for tap, program in compiled.programs:
            tap.program = program
        self.installed = compiled

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
