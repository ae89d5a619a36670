"""The module tree as paths and shapes: the one view of a model that the structural search works on.

Holds every module once, its leaves with their widths, its projections, and which of them carry a query/key/value
name ("seeds"). Knows nothing of blocks, roles or sites. Paths are dotted, "" is the model itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from kitout.base.find import module_shapes
from kitout.base.find.vocabulary import PREFIXED, PROJECTION_NAMES, TRIPLE


@dataclass(frozen=True)
class Projection:
    """A linear map at a path. conv: it is a convolution. wide: one that sees several positions."""

    path: str
    d_in: int
    d_out: int
    is_conv: bool
    spans_positions: bool
    name_candidates: tuple[str, ...]  # its own name, then those of the wrappers that hold nothing else
    container: str  # the path of the innermost module that is more than a wrapper around it


@dataclass(frozen=True)
class ModuleTree:
    """modules: path -> module. leaves: path -> what it is. projections: linears and convolutions over single
    positions. wide: convolutions over several. seeds: path -> part. mixers: modules that mix positions by convolution.
    """

    modules: dict[str, nn.Module]
    leaves: dict[str, module_shapes.LeafShape]
    projections: dict[str, Projection]
    position_convolutions: dict[str, Projection]
    qkv_named: dict[str, str]
    conv_mixers: frozenset[str]

    @classmethod
    def from_model(cls, model: nn.Module, requested_roles: Mapping[str, str]) -> ModuleTree:
        """given: path -> role that the user fixed; an attention role makes (or unmakes) a seed."""
        modules = {path: m for path, m in model.named_modules() if ".parametrizations" not in f".{path}"}
        leaves = {path: leaf for path, m in modules.items() if path and (leaf := module_shapes.leaf_shape(m))}
        every = _find_projections(modules, leaves)
        projections = {path: p for path, p in every.items() if not p.spans_positions}
        wide = {path: p for path, p in every.items() if p.spans_positions}
        convolved = {a for path, m in modules.items() if _spans_positions(m) for a in ancestors(path)}
        mixers = frozenset(_find_mixers(modules, projections))
        seeds = {p.path: part for p in projections.values() if (part := _qkv_part(p, requested_roles, convolved))}
        return cls(modules, leaves, projections, wide, seeds, mixers)

    @staticmethod
    def is_inside(path: str, root: str) -> bool:
        """path is root or inside it."""
        return not root or path == root or path.startswith(root + ".")

    @classmethod
    def is_inside_any(cls, path: str, roots: Iterable[str]) -> bool:
        return any(cls.is_inside(path, root) for root in roots)

    def projections_in(self, roots: Iterable[str], spans_positions: bool = False) -> list[Projection]:
        """The projections (wide: the convolutions over several positions) inside these modules, in module order."""
        roots = tuple(roots)
        return [
            p
            for path, p in (self.position_convolutions if spans_positions else self.projections).items()
            if self.is_inside_any(path, roots)
        ]


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
    held = Counter(a for path, (_, _, _, wide) in widths.items() if not wide for a in ancestors(path))
    found = {}
    for path, (d_in, d_out, conv, wide) in widths.items():
        # A module around exactly one projection (a clipping wrapper, a Sequential with dropout) lends it its name.
        wrapped = [path]
        for above in ancestors(path):
            if held[above] != 1 or not above or isinstance(modules.get(above), nn.ModuleList):
                break
            wrapped.append(above)
        names = tuple(w.rpartition(".")[2] for w in wrapped)
        found[path] = Projection(path, d_in, d_out, conv, wide, names, parent(wrapped[-1]))
    return found


def _projection_widths(module: nn.Module, leaf: module_shapes.LeafShape) -> tuple[int, int, bool, bool] | None:
    """(d_in, d_out, conv, wide) of what can be a projection."""
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
            holders = (a for a in ancestors(path) if any(ModuleTree.is_inside(p, a) for p in projections))
            yield next(holders, "")


def _qkv_part(projection: Projection, requested_roles: Mapping[str, str], conv_paths: Collection[str]) -> str | None:
    """q, k, v or qkv, if the user or the projection's name says so."""
    if role := requested_roles.get(projection.path):
        kind, _, part = role.partition(".")
        return part if kind in ("attn", "cross") and part != "o" else None
    for name in projection.name_candidates:
        for part, words in PROJECTION_NAMES.items():
            if words.fullmatch(name):
                return part
        triple = TRIPLE.fullmatch(name) and projection.d_out == 3 * projection.d_in
        if triple and projection.container not in conv_paths:  # else a gated convolution
            return "qkv"
    if prefixed := PREFIXED.fullmatch(projection.name_candidates[0]):
        return prefixed["part"][0].lower()
    return None
