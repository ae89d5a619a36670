"""`kitout.compile` and `kitout.compiled`: torch.compile over the blocks of a kit, and what it made.

Checked first: is there anything to compile, and can this machine. How a call becomes a graph is in `block_graphs`. It
knows kits by their state, and no method. Source: torch 2.13.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kitout.errors import ConfigError, Errors, KitoutError, suggest
from kitout.install_hint import suggest_install
from kitout.runtime.delegation import ModelInterface
from kitout.runtime.graphs.block_graphs import BlockGraphs
from kitout.runtime.graphs.report import CompileReport
from kitout.runtime.state import KitState

OPTIONS = ("dynamic", "fullgraph", "mode", "options")  # of torch.compile
WITHOUT = "it runs the same without: kitout.compile(kit, disable=True), train.compile=off"
K = TypeVar("K", bound=ModelInterface)


def compile(  # noqa: A001 - its public name is kitout.compile
    kit: K, *, backend: Any = "inductor", limit: int = 16, disable: bool = False, **options: Any
) -> K:
    """Compiles each block of the kit's base with its active adapters, at its next calls; returns the kit.

    Adapters of one method and equal shapes share graphs. The base, another method, rows, a Mix, another shape of the
    inputs and another mode cost new ones, each with seconds to minutes of compiling. limit: most graphs; what would
    need one more runs without, and a warning names its route. backend and options (dynamic, fullgraph, mode, options)
    are those of torch.compile; without fullgraph=False a block is one graph or none. A new call drops all graphs;
    disable: and makes no new ones. Raises ConfigError.
    """
    state = _state_of(kit, "compile")
    state.check_attached()
    paths = [block.path for block in state.survey.blocks if block.is_one_module]
    errors = Errors(ConfigError, "kitout.compile")
    if unknown := [name for name in options if name not in OPTIONS]:
        errors.add(f"{unknown[0]!r} is no option of torch.compile that it takes: {suggest(unknown[0], OPTIONS)}")
    if type(limit) is not int or limit < 1:
        errors.add(f"limit is a number of graphs, 1 or more, found {limit!r}")
    if not paths:
        errors.add(f"{type(state.base).__name__} has no block that is one module, so there is nothing to compile")
    if not disable:
        for problem in (_find_unusable_weights(state.base), find_missing_compiler(backend, state.device.type)):
            if problem:
                errors.add(f"{problem}; {WITHOUT}")
    errors.raise_if_any()
    with state.active.lock:
        remove_graphs(state)
        if not disable:
            state.graphs = BlockGraphs(state, paths, limit, {"backend": backend, "fullgraph": True, **options})
            for path in paths:
                state.hooks[path].graphs = state.graphs
    return kit


def compiled(kit: ModelInterface) -> CompileReport:
    """The graphs of `kitout.compile` so far: their kinds, shapes and seconds, and what ran without one. print() it."""
    graphs: BlockGraphs | None = _state_of(kit, "compiled").graphs
    return CompileReport() if graphs is None else graphs.report()


def remove_graphs(state: KitState) -> None:
    """Nothing is compiled any more, and nothing is left of it."""
    for hook in state.hooks.values():
        hook.graphs = None
    state.graphs = None


def find_missing_compiler(backend: Any, device_type: str) -> str:
    """What the default backend lacks on this machine and how to install it; "" where it lacks nothing."""
    if backend != "inductor":
        return ""
    if device_type == "cuda":
        has_triton = importlib.util.find_spec("triton") is not None
        return "" if has_triton else f"the backend inductor needs triton on a GPU: {suggest_install('triton')}"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return (
            "the backend inductor needs a C++ compiler, and none was found: install one (apt install g++, dnf install "
            "gcc-c++, the package gxx of conda; on macOS xcode-select --install)"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the backend inductor needs Python's headers, and Python.h was not found: apt install python3-dev"
    return ""


def _state_of(kit: Any, function: str) -> KitState:
    if not isinstance(kit, ModelInterface):
        found = type(kit).__name__
        raise KitoutError(f"kitout.{function}() takes a kit, found {found}: kitout.attach(model) makes one")
    state: KitState = kit.state
    return state


def _find_unusable_weights(base: nn.Module) -> str:
    """Weights of classes that graphs are not tested with; "" where there are none."""
    found = [
        name for name, value in base.named_parameters()
        if type(value.data) is not Tensor or not value.is_floating_point() or value.dtype.itemsize == 1
    ]  # fmt: skip
    if not found:
        return ""
    kind = "sharded" if torch.distributed.is_available() and _is_sharded(base) else "quantized"
    return f"{len(found)} weights are {kind} ({found[0]}, ...), which is not compiled"


def _is_sharded(base: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(value.data, DTensor) for value in base.parameters())
