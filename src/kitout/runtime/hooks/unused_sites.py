"""Proof by the first real call, where attach could not run one: do the active sites run?

It knows hooks and paths, and nothing of methods, rows or files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from kitout.errors import UnusedSite
from kitout.runtime.state import KitState


class UnusedSiteCheck(AbstractContextManager[None]):
    """Records which active sites run in one forward or generate, and raises UnusedSite for those that do not."""

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
        missed = [
            hook.path
            for hook, _ in self.state.active.installed.programs
            if hook.path in self.state.unproven - self.called
        ]
        self.state.unproven -= self.called
        if missed:
            raise UnusedSite(
                f"{', '.join(missed[:5])} did not run in this call: nothing placed there has an effect. Choose "
                "other targets, or attach(model, example_batch=batch) with a batch that reaches every part of the model"
            )
