"""The module tree as paths and shapes: the one view of a model that the structural search works on.

Holds every module once, its leaves with their widths, its projections, and which of them carry a query/key/value
name ("seeds"). Knows nothing of blocks, roles or sites. Paths are dotted, "" is the model itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from kitout.base import shapes
from kitout.base.vocabulary import PROJECTION_NAMES, TRIPLE


@dataclass(frozen=True)
class Projection:
    """A linear map at a path. conv: it is a convolution over single positions."""

    path: str
    d_in: int
    d_out: int
    conv: bool
    names: tuple[str, ...]  # its own name, then those of the wrappers that hold nothing else
    home: str  # the path of the innermost module that is more than a wrapper around it


@dataclass(frozen=True)
class Tree:
    """modules: path -> module. leaves: path -> what it is. projections, seeds (path -> part): see the module text."""

    modules: dict[str, nn.Module]
    leaves: dict[str, shapes.Leaf]
    projections: dict[str, Projection]
    seeds: dict[str, str]
    mixers: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, given: Mapping[str, str]) -> Tree:
        """given: path -> role that the user fixed; an attention role makes (or unmakes) a seed."""
        modules = {path: m for path, m in model.named_modules() if ".parametrizations" not in f".{path}"}
        leaves = {path: leaf for path, m in modules.items() if path and (leaf := shapes.leaf(m))}
        projections = _projections(modules, leaves)
        mixers = frozenset(_mixers(modules, projections))
        seeds = {p.path: part for p in projections.values() if (part := _part(p, given, mixers))}
        return cls(modules, leaves, projections, seeds, mixers)

    @staticmethod
    def under(path: str, root: str) -> bool:
        """path is root or inside it."""
        return not root or path == root or path.startswith(root + ".")

    @classmethod
    def under_any(cls, path: str, roots: Iterable[str]) -> bool:
        return any(cls.under(path, root) for root in roots)

    def within(self, roots: Iterable[str]) -> list[Projection]:
        """The projections inside any of these modules, in module order."""
        roots = tuple(roots)
        return [p for path, p in self.projections.items() if self.under_any(path, roots)]


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def ancestors(path: str) -> Iterator[str]:
    """The paths above this one, nearest first, the model ("") last."""
    while path:
        path = parent(path)
        yield path


def _projections(modules: Mapping[str, nn.Module], leaves: Mapping[str, shapes.Leaf]) -> dict[str, Projection]:
    widths = {
        path: (w, leaf.kind == "conv")
        for path, leaf in leaves.items()
        if (w := shapes.linear(modules[path]) or shapes.pointwise(modules[path]))
    }
    held = Counter(a for path in widths for a in ancestors(path))
    found = {}
    for path, ((d_in, d_out), conv) in widths.items():
        # A module around exactly one projection (a clipping wrapper, a Sequential with dropout) lends it its name.
        wrapped = [path]
        for above in ancestors(path):
            if held[above] != 1 or not above or isinstance(modules.get(above), nn.ModuleList):
                break
            wrapped.append(above)
        names = tuple(w.rpartition(".")[2] for w in wrapped)
        found[path] = Projection(path, d_in, d_out, conv, names, parent(wrapped[-1]))
    return found


def _mixers(modules: Mapping[str, nn.Module], projections: Mapping[str, Projection]) -> Iterator[str]:
    """Modules that mix positions by a 1-D convolution (state-space, gated convolution): never a feed-forward."""
    for path, module in modules.items():
        if isinstance(module, nn.Conv1d) and not shapes.pointwise(module):
            holders = (a for a in ancestors(path) if any(Tree.under(p, a) for p in projections))
            yield next(holders, "")


def _part(projection: Projection, given: Mapping[str, str], mixers: frozenset[str]) -> str | None:
    """q, k, v or qkv, if the user or the projection's name says so."""
    if role := given.get(projection.path):
        kind, _, part = role.partition(".")
        return part if kind in ("attn", "cross") and part != "o" else None
    for name in projection.names:
        for part, words in PROJECTION_NAMES.items():
            if words.fullmatch(name):
                return part
        if TRIPLE.fullmatch(name) and projection.d_out == 3 * projection.d_in and projection.home not in mixers:
            return "qkv"
    return None
