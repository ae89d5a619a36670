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

from kitout.runtime.hooks.class_swap import Program, Tap
from kitout.runtime.modules.rows import Plan
from kitout.runtime.routing.recompute import Graphs
from kitout.runtime.routing.route import Route, names
from kitout.runtime.virtual_tokens.forward_state import Call, Here


@dataclass(eq=False)
class Bound:
    """A compiled route: programs by tap, the number of rows it names (None: any batch) and who wears what in them.

    here: where its programs find the Call in progress, None where they need none. call: that of one forward.
    """

    route: Route
    items: list[tuple[Tap, Program]] = field(default_factory=list)
    rows: int | None = None
    plan: Plan | None = None
    here: Here | None = None
    call: Call = field(default_factory=Call)

    def begun(self) -> Bound:
        """For one forward of its own."""
        return self if self.here is None else replace(self, call=Call())


class Choice:
    """One call of `use`, as an object of its own so that leaving a `with` removes exactly it."""

    __slots__ = ("route",)

    def __init__(self, route: Route) -> None:
        self.route = route


class Live:
    """The state shared by a kit, its model boundary and its blocks."""

    def __init__(self) -> None:
        self.bound = Bound(None)
        self.sticky: deque[Choice] = deque([Choice(None)], maxlen=256)
        self.pending: dict[int, Choice] = {}  # by thread: chosen, but not yet known to be sticky
        self.entered: Counter[str] = Counter()  # adapters by the number of `with` blocks that wear them
        self.depth = 0  # > 0 inside a forward that crossed the model boundary, or a recomputation whose route is known
        self.generating = 0  # > 0 inside generate, where beams multiply the rows
        self.counting = True  # inside generate: its caller gave no positions
        self.leading = 0  # > 0 while a prompt is run ahead of its text
        self.graphs: Graphs[Bound] = Graphs()
        self._make_unshared()

    def _make_unshared(self) -> None:
        self.lock = threading.RLock()
        # By cache: how many positions lay in front of each row's text when it was filled.
        self.fronts: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()
        self.local: ContextVar[Choice | None] = ContextVar("kitout_route", default=None)

    def __getstate__(self) -> dict[str, Any]:  # locks and context variables neither pickle nor deepcopy
        self.settle()
        return {k: v for k, v in self.__dict__.items() if k not in ("lock", "local", "fronts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_unshared()

    @property
    def route(self) -> Route:
        """What this context wears: its own `with` route, else its thread's last choice, else the sticky one."""
        choice = self.local.get() or self.pending.get(threading.get_ident()) or self.sticky[-1]
        return choice.route

    @property
    def counts(self) -> bool:
        """Whether `position_ids` come from `generate`, which counts them from the mask, and not from a caller."""
        return self.generating > 0 and self.counting

    def settle(self, thread: int | None = None) -> None:
        """A thread's last choice (default: this thread's) was not entered by a `with`: it holds for everybody."""
        choice = self.pending.pop(threading.get_ident() if thread is None else thread, None)
        if choice is not None:
            self.sticky.append(choice)

    def forget(self, name: str) -> None:
        """Earlier choices that wear an adapter which goes: leaving a later one must not bring them back."""
        kept = [c for c in self.sticky if name not in names(c.route)]
        self.sticky.clear()
        self.sticky.extend(kept)

    def lay(self, bound: Bound) -> None:
        """Puts a compiled route on the taps."""
        if bound.here is not None:
            bound.here.call = bound.call
        if bound.items is self.bound.items:
            self.bound = bound
            return
        for tap, _ in self.bound.items:
            tap.program = None
        for tap, program in bound.items:
            tap.program = program
        self.bound = bound

    @contextmanager
    def reentered(self, bound: Bound) -> Iterator[None]:
        """The route a graph was recorded under, for the time its activations are recomputed (any thread)."""
        with self.lock:
            before = self.bound
            self.lay(bound)
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1
                self.lay(before)
