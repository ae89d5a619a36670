"""Finds the stacks of blocks: the innermost module lists whose every element holds attention-like projections.

Three shapes of list need more than that sentence, all decided by structure: a list of bare attentions inside a block
(the block is the element around it), lists that run in parallel ("attentions", "ffns", "norms": element i of each is
one block), and hybrid stacks of which only some blocks attend. Knows no roles beyond "this is a query, key or value".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from kitout.base.find.module_tree import ModuleTree, ancestors, parent

LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class BlockCandidate:
    """One block before its roles are known.

    index: its number in the list. members: the modules it is made of, its own element of the list first. whole: what
    that one returns is what the block returns.
    """

    tower: str
    index: int
    members: tuple[str, ...]
    is_one_module: bool


def find_blocks(tree: ModuleTree) -> list[BlockCandidate]:
    """The blocks of every stack, in module order."""
    return _find_stacks(tree, include_convs=False) or _find_stacks(tree, include_convs=True)


def _find_stacks(tree: ModuleTree, include_convs: bool) -> list[BlockCandidate]:
    """convs: pointwise convolutions count as projections, which they do only where no linear does."""
    holding = _attending_modules(tree, include_convs)
    lists = {path: kids for path in tree.modules if (kids := _list_elements(tree, path))}
    every = [path for path, kids in lists.items() if all(kid in holding for kid in kids)]
    every = [
        path
        for path in every
        if not (_are_bare_attentions(tree, lists[path]) and any(a in every for a in ancestors(path)))
    ]
    some = [path for path, kids in lists.items() if _is_hybrid(tree, kids, holding) and not _is_nested(path, every)]
    chosen = [path for path in (*every, *some) if not any(path in ancestors(other) for other in (*every, *some))]
    return list(_join_parallel_lists(tree, {path: lists[path] for path in lists if path in chosen}, lists))


def _attending_modules(tree: ModuleTree, include_convs: bool) -> set[str]:
    """Every module that holds an attention-like projection, or torch's own attention."""
    named = [path for path in tree.qkv_named if include_convs or not tree.projections[path].is_conv]
    attending = [*named, *(p for p, m in tree.modules.items() if isinstance(m, nn.MultiheadAttention))]
    return {above for path in attending for above in (path, *ancestors(path))}


def _list_elements(tree: ModuleTree, path: str) -> tuple[str, ...]:
    """The elements of a module list, each module once (a shared block keeps its first place)."""
    module = tree.modules[path]
    if not path or not isinstance(module, LISTS):
        return ()
    return tuple(kid for name, _ in module.named_children() if (kid := f"{path}.{name}") in tree.modules)


def _are_bare_attentions(tree: ModuleTree, children: tuple[str, ...]) -> bool:
    """The elements are attentions, not blocks around one: the projections are their own children."""
    return all(
        any(tree.projections[s].container == kid for s in tree.qkv_named if tree.is_inside(s, kid)) for kid in children
    ) and all(all(p.container == kid for p in tree.projections_in([kid])) for kid in children)


def _is_hybrid(tree: ModuleTree, children: tuple[str, ...], attending: set[str]) -> bool:
    """Some elements attend, the others have at least a norm and a projection, as blocks do."""
    return any(kid in attending for kid in children) and all(
        kid in attending or (_has_norm(tree, kid) and bool(tree.projections_in([kid]))) for kid in children
    )


def _has_norm(tree: ModuleTree, root: str) -> bool:
    return any(leaf.kind == "norm" for path, leaf in tree.leaves.items() if tree.is_inside(path, root))


def _is_nested(path: str, others: list[str]) -> bool:
    """It lies inside one of the others, or one of them inside it."""
    return any(ModuleTree.is_inside(path, other) or ModuleTree.is_inside(other, path) for other in others)


def _join_parallel_lists(
    tree: ModuleTree, stacks: dict[str, tuple[str, ...]], lists: dict[str, tuple[str, ...]]
) -> Iterator[BlockCandidate]:
    """Lists of bare attentions run beside others of the same length: element i of each belongs to one block."""
    bare = {path for path, kids in stacks.items() if _are_bare_attentions(tree, kids)}
    hosts: dict[str, list[str]] = {path: [] for path in stacks}
    for path in stacks:
        if path not in bare or path not in hosts:
            continue
        beside = [p for p in lists if p != path and parent(p) == parent(path) and len(lists[p]) == len(stacks[path])]
        if full := [p for p in beside if p in stacks and p not in bare]:
            hosts[full[0]].append(path)
            del hosts[path]
        else:
            hosts[path] = beside
            hosts = {p: more for p, more in hosts.items() if p not in beside}
    for path, beside in hosts.items():
        for i, kid in enumerate(stacks[path]):
            name = kid.rpartition(".")[2]
            whole = path not in bare or not beside  # a block may hold all its projections itself
            yield BlockCandidate(path, int(name) if name.isdigit() else i, (kid, *(lists[p][i] for p in beside)), whole)
