"""What was compiled of a kit's blocks, as values: one entry per graph, its kind, shape and seconds.

It knows routes by their names and methods by their classes, and compiles nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kitout.format import format_duration
from kitout.route import Average, Composed, Mix, Only, Route, Stack


@dataclass(eq=False)
class CompiledGraph:
    """One graph of one kind of block."""

    kind: str
    """What is active: "base", "LoRA", "rows(IA3, LoRA)", "Mix(LoRA, LoRA)"."""
    route: str
    """The route that it was compiled under first; others of the same kind share it."""
    block: str
    """The path of the block that it was compiled for first; others of the same shapes share it."""
    shape: tuple[int, ...]
    """Of what entered that block."""
    has_grad: bool
    """Whether a gradient was recorded."""
    seconds: float = 0.0
    """Of compiling its forward and, once a backward has run, its backward."""
    error: str = ""
    """Why there is none after all: the block runs as before under routes of this kind."""


@dataclass(frozen=True)
class CompileReport:
    """What `kitout.compiled(kit)` says."""

    graphs: tuple[CompiledGraph, ...] = ()
    """In the order they were compiled, those that failed included."""
    limit: int = 0
    """Most graphs there may be; 0: nothing is compiled."""
    eager: Mapping[str, int] | None = None
    """Calls of blocks that ran as before, by the reason."""

    @property
    def kinds(self) -> dict[str, int]:
        """The number of graphs of each kind."""
        return dict(Counter(graph.kind for graph in self.graphs if not graph.error))

    @property
    def seconds(self) -> float:
        """What compiling took."""
        return sum(graph.seconds for graph in self.graphs)

    def __str__(self) -> str:
        if not self.limit:
            return "not compiled: kitout.compile(kit)"
        lines = [f"{len(self.graphs)} of at most {self.limit} graphs, compiled in {format_duration(self.seconds)}"]
        for kind, count in self.kinds.items():
            of_kind = [graph for graph in self.graphs if graph.kind == kind and not graph.error]
            shapes = ", ".join(dict.fromkeys(" x ".join(map(str, graph.shape)) for graph in of_kind))
            seconds = format_duration(sum(graph.seconds for graph in of_kind))
            lines.append(f"  {kind}: {count} graph{'s' * (count > 1)}, {seconds}, inputs {shapes}")
        failed = {graph.kind: graph.error for graph in self.graphs if graph.error}
        lines += [f"  {kind}: not compiled ({error})" for kind, error in failed.items()]
        lines += [f"  {count} calls of blocks ran as before: {reason}" for reason, count in (self.eager or {}).items()]
        return "\n".join(lines)


def kind_of(route: Route, method_of: Callable[[str], str]) -> str:
    """A route in the classes of its adapters' methods: what decides, besides shapes, how many graphs there are."""
    if route is None:
        return "base"
    if isinstance(route, str):
        return method_of(route)
    if isinstance(route, Composed):
        return method_of(route.name)
    if isinstance(route, Only):
        return f"Only({kind_of(route.entry, method_of)})"
    if isinstance(route, tuple):
        return f"rows({', '.join(sorted({kind_of(entry, method_of) for entry in route}))})"
    parts = [part for part, _ in route.parts] if isinstance(route, (Mix, Average)) else list(route.parts)
    assert isinstance(route, (Stack, Mix, Average))
    return f"{type(route).__name__}({', '.join(kind_of(part, method_of) for part in parts)})"
