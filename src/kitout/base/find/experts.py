"""Mixtures of experts by structure: experts fused into parameters, lists of modules built alike, and routers.

Experts come in two forms: all of a block in one parameter [E, f, d], at which no value of one expert passes, or as a
list of modules of which the data chooses some. A router is what has one output per expert beside them. Everything here
looks at shapes; a name decides only for a router with another number of outputs. It knows nothing of sites.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from kitout.base.find.module_shapes import has_stacked_experts
from kitout.base.find.module_tree import ModuleTree, parent
from kitout.base.find.vocabulary import ROUTER


def fused_experts(tree: ModuleTree, inside: Collection[str], widths: Collection[int]) -> list[str]:
    """Names of the parameters of modules that hold all experts of a block. inside: paths of the blocks.

    widths: those of the residual streams. Such a module has matrices of every expert that read or write one of them.
    """
    names: list[str] = []
    for path, module in tree.modules.items():
        own = dict(module.named_parameters(recurse=False))
        if _holds_all_experts(module, widths) and tree.is_inside_any(path, inside):
            names += [f"{path}.{name}" for name in own]
    return names


def _holds_all_experts(module: nn.Module, widths: Collection[int]) -> bool:
    own = list(module.parameters(recurse=False))
    if has_stacked_experts(module):
        return any(p.ndim == 3 and p.shape[0] > 1 and _has_width(p.shape[1:], widths) for p in own)
    flat = [p for p in own if p.ndim == 2 and _has_width(p.shape, widths)]  # [E * f, d]
    return len(flat) > 1 and not isinstance(module, nn.MultiheadAttention)


def _has_width(shape: Sequence[int], widths: Collection[int]) -> bool:
    """One of the axes is as wide as a residual stream."""
    return any(n in widths for n in shape)


def alternatives(tree: ModuleTree, inside: Collection[str]) -> list[tuple[str, ...]]:
    """Lists inside the blocks of modules built alike: same class, same shapes, with a projection in each."""
    found = []
    for path, module in tree.modules.items():
        if path in inside or not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        if not tree.is_inside_any(path, inside):
            continue
        by_form: dict[tuple[object, ...], list[str]] = {}
        for element in (f"{path}.{name}" for name, _ in module.named_children()):
            if tree.projections_in([element]):
                by_form.setdefault(_form(tree.modules[element]), []).append(element)
        found += [tuple(elements) for elements in by_form.values() if len(elements) > 1]
    return found


def _form(module: nn.Module) -> tuple[object, ...]:
    return type(module), *((name, tuple(p.shape)) for name, p in module.named_parameters())


def routers(
    tree: ModuleTree, experts: Collection[str], lists: Collection[tuple[str, ...]], free: Collection[str]
) -> Iterator[str]:
    """Paths of the routers. experts: of modules that hold all experts; lists: see `alternatives`; free: of leaves
    without a role.
    """
    holders = [(path, max(p.shape[0] for p in tree.modules[path].parameters(recurse=False))) for path in experts]
    holders += [(parent(elements[0]), len(elements)) for elements in lists]
    for path in free:
        leaf = tree.leaves[path]
        if leaf.kind not in ("linear", "other"):
            continue
        for holder, number in holders:
            if not tree.is_inside(path, parent(holder)) or tree.is_inside(path, holder):
                continue
            name = path[len(parent(holder)) :]
            if leaf.d_out == number or ROUTER.search(name):
                yield path
                break
