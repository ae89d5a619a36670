"""Weights that only a cached step reads by itself: a convolution over the text is called for a whole text, and computed
by hand from its weight where one token follows a cache (state-space and recurrent blocks).

Two generated tokens show it. Such a site acts on the weight while its reader runs, which covers both. It knows paths
and parameters, no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kitout.base.survey import Survey


def readers_in_cached_steps(survey: Survey, batch: Mapping[str, Any]) -> dict[str, set[str]]:
    """By path of a convolution in a block: the modules that read its parameters in its place."""
    model: Any = survey.model
    convolutions = {s.path: s.module for s in survey.sites if s.kind == "conv" and s.layer is not None}
    ids, can_generate = batch.get("input_ids"), getattr(model, "can_generate", None)
    if not convolutions or can_generate is None or not can_generate() or not isinstance(ids, Tensor) or ids.is_meta:
        return {}
    reads = _ParameterReads(convolutions)
    ancestors = {path[:i] for path in convolutions for i, c in enumerate(path) if c == "."}
    with ExitStack() as stack, suppress(Exception):  # a model that does not generate so has no such step to show
        for path in (*ancestors, *convolutions):
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(partial(reads.enter, path)).remove)
            stack.callback(module.register_forward_hook(reads.leave, always_call=True).remove)
        stack.enter_context(reads)
        model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=True)
    return reads.readers


def keeps_state(module: nn.Module) -> bool:
    """It keeps tensors of its last run as plain attributes, so that it cannot be run once for each adapter."""
    return any(isinstance(value, Tensor) for m in module.modules() for value in m.__dict__.values())


class _ParameterReads(TorchFunctionMode):
    """Who reads the parameters of some modules, besides these modules."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.readers: dict[str, set[str]] = {}
        self._owner = {id(p): path for path, m in modules.items() for p in m.parameters(recurse=False)}
        self._open: list[str] = []

    def enter(self, path: str, _module: nn.Module, _args: Any) -> None:
        self._open.append(path)

    def leave(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        self._open.pop()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            owner = self._owner.get(id(value)) if isinstance(value, nn.Parameter) else None
            if owner is not None and self._open and self._open[-1] != owner:
                self.readers.setdefault(owner, set()).add(self._open[-1])
        return func(*args, **(kwargs or {}))
