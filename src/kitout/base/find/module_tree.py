"""The module tree as paths and shapes: the one view of a model that the structural search works on.

It holds every module once, the leaves with their widths, the projections, and which of them have a query, key or value
name. It knows nothing of blocks, roles or sites. Paths are dotted, "" is the model itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from kitout.base.find import module_shapes
from kitout.base.find.vocabulary import PREFIXED, PROJECTION_NAMES, TRIPLE


@dataclass(frozen=True)
class Projection:
    """A linear map at a path: a linear or a convolution."""

    path: str
    """Path of the module."""
    d_in: int
    """Width of its input."""
    d_out: int
    """Width of its output."""
    is_conv: bool
    """It is a convolution."""
    spans_positions: bool
    """It is a convolution that sees several positions."""
    name_candidates: tuple[str, ...]
    """Its own name, then those of the wrappers that hold nothing else."""
    container: str
    """Path of the innermost module that is more than a wrapper around it."""


@dataclass(frozen=True)
class ModuleTree:
    """A model's modules by path, in module order."""

    modules: dict[str, nn.Module]
    """Every module, once."""
    leaves: dict[str, module_shapes.LeafShape]
    """Every module without parts."""
    projections: dict[str, Projection]
    """Linears, and convolutions over single positions."""
    position_convolutions: dict[str, Projection]
    """Convolutions over several positions."""
    qkv_named: dict[str, str]
    """Path -> "q", "k", "v" or "qkv" of the projections with such a name."""
    conv_mixers: frozenset[str]
    """Paths of modules that mix positions by convolution."""

    @classmethod
    def from_model(cls, model: nn.Module, requested_roles: Mapping[str, str]) -> ModuleTree:
        """requested_roles: path -> role given by the user; an attention role counts as a name, any other as none."""
        modules = {path: m for path, m in model.named_modules() if ".parametrizations" not in f".{path}"}
        leaves = {path: leaf for path, m in modules.items() if path and (leaf := module_shapes.leaf_shape(m))}
        both = _find_projections(modules, leaves)
        projections = {path: p for path, p in both.items() if not p.spans_positions}
        above_convs = {a for path, m in modules.items() if _spans_positions(m) for a in ancestors(path)}
        return cls(
            modules,
            leaves,
            projections,
            position_convolutions={path: p for path, p in both.items() if p.spans_positions},
            qkv_named={
                p.path: part for p in projections.values() if (part := _qkv_part(p, requested_roles, above_convs))
            },
            conv_mixers=frozenset(_find_mixers(modules, projections)),
        )

    @staticmethod
    def is_inside(path: str, root: str) -> bool:
        """path is root or inside it."""
        return not root or path == root or path.startswith(root + ".")

    @classmethod
    def is_inside_any(cls, path: str, roots: Iterable[str]) -> bool:
        return any(cls.is_inside(path, root) for root in roots)

    def projections_in(self, roots: Iterable[str], spans_positions: bool = False) -> list[Projection]:
        """The projections (or the convolutions over several positions) inside these modules, in module order."""
        projections = self.position_convolutions if spans_positions else self.projections
        return [projections[path] for path in self.paths_in(roots) if path in projections]

    def paths_in(self, roots: Iterable[str]) -> list[str]:
        """The modules inside these ones, themselves included, in module order."""
        roots = tuple(roots)
        if len(roots) == 1:
            return self._inside.get(roots[0], [])
        return sorted({path for root in roots for path in self._inside.get(root, ())}, key=self._order.__getitem__)

    @cached_property
    def _inside(self) -> dict[str, list[str]]:
        """What is inside each module: a search of all paths for every block would be quadratic in the depth."""
        inside: dict[str, list[str]] = {}
        for path in self.modules:
            for above in (path, *ancestors(path)):
                inside.setdefault(above, []).append(path)
        return inside

    @cached_property
    def _order(self) -> dict[str, int]:
        return {path: i for i, path in enumerate(self.modules)}


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def ancestors(path: str) -> Iterator[str]:
    """The paths above this one, nearest first, the model ("") last."""
    while path:
        path = parent(path)
        yield path


def _find_projections(
    modules: Mapping[str, nn.Module], leaves: Mapping[str, module_shapes.LeafShape]
) -> dict[str, Projection]:
    widths = {path: w for path, leaf in leaves.items() if (w := _projection_widths(modules[path], leaf))}
    num_inside = Counter(a for path, (*_, spans) in widths.items() if not spans for a in ancestors(path))
    projections = {}
    for path, (d_in, d_out, is_conv, spans) in widths.items():
        # A module around exactly one projection (a clipping wrapper, a Sequential with dropout) may name it too.
        wrappers = [path]
        for above in ancestors(path):
            if num_inside[above] != 1 or not above or isinstance(modules.get(above), nn.ModuleList):
                break
            wrappers.append(above)
        names = tuple(w.rpartition(".")[2] for w in wrappers)
        projections[path] = Projection(path, d_in, d_out, is_conv, spans, names, parent(wrappers[-1]))
    return projections


def _projection_widths(module: nn.Module, leaf: module_shapes.LeafShape) -> tuple[int, int, bool, bool] | None:
    """(d_in, d_out, is_conv, spans_positions) of what can be a projection, else None."""
    if leaf.kind == "linear":
        return leaf.d_in, leaf.d_out, False, False
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)) or (_spans_positions(module) and module.groups > 1):
        return None
    return leaf.d_in, leaf.d_out, True, _spans_positions(module)


def _spans_positions(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and not module_shapes.is_pointwise(module)


def _find_mixers(modules: Mapping[str, nn.Module], projections: Mapping[str, Projection]) -> Iterator[str]:
    """Modules that mix positions by a 1-D convolution (state-space, gated convolution): never a feed-forward."""
    for path, module in modules.items():
        if isinstance(module, nn.Conv1d) and _spans_positions(module):
            with_projections = (a for a in ancestors(path) if any(ModuleTree.is_inside(p, a) for p in projections))
            yield next(with_projections, "")


def _qkv_part(projection: Projection, requested_roles: Mapping[str, str], above_convs: Collection[str]) -> str | None:
    """q, k, v or qkv, if the user or the projection's name says so. above_convs: modules that hold a convolution."""
    if role := requested_roles.get(projection.path):
        kind, _, part = role.partition(".")
        return part if kind in ("attn", "cross") and part != "o" else None
    for name in projection.name_candidates:
        for part, words in PROJECTION_NAMES.items():
            if words.fullmatch(name):
                return part
        triple = TRIPLE.fullmatch(name) and projection.d_out == 3 * projection.d_in
        if triple and projection.container not in above_convs:  # else a gated convolution
            return "qkv"
    if prefixed := PREFIXED.fullmatch(projection.name_candidates[0]):
        return prefixed["part"][0].lower()
    return None
