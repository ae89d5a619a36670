"""Proof by the first real call, where attach could not run one: do the active sites run?

It knows hooks and paths, and nothing of methods, rows or files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from kitout.route import adapter_names
from kitout.runtime.left_out import check_named, warn_left_out
from kitout.runtime.state import KitState

NOT_IN_FORWARD = (
    "did not run in the first call; attach(model, example_batch=batch) with a batch that reaches every part of the "
    "model finds what runs"
)


class UnusedSiteCheck(AbstractContextManager[None]):
    """Records which active sites run in one forward or generate. What an adapter selected by a group and did not run is
    reported.

    Raises UnusedSite where nothing of an adapter ran, or nothing of what its targets name.
    """

    def __init__(self, state: KitState) -> None:
        self.state, self.called = state, set[str]()
        self.handles: dict[str, Any] = {}

    def __enter__(self) -> None:
        for hook, _ in self.state.active.installed.programs:
            if hook.path in self.state.unproven:
                self.handles[hook.path] = hook.module.register_forward_pre_hook(self._record_call(hook.path))

    def _record_call(self, path: str) -> Callable[..., None]:
        def record(*_: Any) -> None:
            self.called.add(path)
            self.handles[path].remove()  # once is enough, and a loop of generate may be compiled

        return record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles.values():
            handle.remove()
        if kind is not None:
            return
        active = {hook.path for hook, _ in self.state.active.installed.programs}
        missed = (active & self.state.unproven) - self.called - self._alternatives()
        self.state.unproven -= self.called
        for name in self.state.names_with_parts(adapter_names(self.state.active.installed.route)):
            adapter = self.state[name]
            left_out = dict.fromkeys((s.path for s in adapter.sites if (s.reader or s.path) in missed), NOT_IN_FORWARD)
            if left_out:
                check_named(adapter.method, adapter.sites, left_out, name)
                adapter.left_out |= left_out
                warn_left_out(name, left_out, stacklevel=2)
        self.state.unproven -= missed

    def _alternatives(self) -> set[str]:
        """Paths of sites in modules among which the data chooses, where another one of them ran: they are alive."""
        chosen = [e for e in self.state.survey.alternatives if any(self._has_run(element) for element in e)]
        return {p for p in self.state.unproven if any(p.startswith(f"{e}.") for elements in chosen for e in elements)}

    def _has_run(self, path: str) -> bool:
        return any(called.startswith(f"{path}.") for called in self.called)
