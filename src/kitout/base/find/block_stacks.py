"""Finds the stacks of blocks: the innermost module lists whose every element holds attention-like projections.

Where nothing attends, blocks are those that mix positions by convolution (state-space models).

Three shapes of list need more than that sentence, all decided by structure: a list of bare attentions inside a block
(the block is the element around it), lists that run in parallel ("attentions", "ffns", "norms": element i of each is
one block), and hybrid stacks of which only some blocks attend. It knows no roles beyond query, key and value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from kitout.base.find.module_tree import ModuleTree, ancestors, parent

LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class BlockCandidate:
    """One block before its roles are known."""

    tower: str
    """Path of the module list."""
    index: int
    """Its number in the list."""
    members: tuple[str, ...]
    """Paths of the modules it consists of, its own element of the list first."""
    is_one_module: bool
    """The first member returns what the block returns."""


def find_blocks(tree: ModuleTree) -> list[BlockCandidate]:
    """The blocks of every stack, in module order."""
    return (
        _find_stacks(tree, include_convs=False)
        or _find_stacks(tree, include_convs=True)
        or _find_attention_free_stacks(tree)
    )


def _find_stacks(tree: ModuleTree, include_convs: bool) -> list[BlockCandidate]:
    """include_convs: pointwise convolutions count as projections; they do only where no linear does."""
    attending = _attending_modules(tree, include_convs)
    lists = {path: elements for path in tree.modules if (elements := _list_elements(tree, path))}
    full = [path for path, elements in lists.items() if all(element in attending for element in elements)]
    full = [  # without the lists of bare attentions inside a block
        path
        for path in full
        if not (_are_bare_attentions(tree, lists[path]) and any(a in full for a in ancestors(path)))
    ]
    hybrid = [
        path for path, elements in lists.items() if _is_hybrid(tree, elements, attending) and not _is_nested(path, full)
    ]
    candidates = [*full, *hybrid]
    innermost = [path for path in candidates if not any(path in ancestors(other) for other in candidates)]
    return list(_join_parallel_lists(tree, {path: lists[path] for path in lists if path in innermost}, lists))


def _find_attention_free_stacks(tree: ModuleTree) -> list[BlockCandidate]:
    """Stacks of state-space blocks alone: each element has a norm, linears and a convolution over positions."""
    mixing = {above for path in tree.conv_mixers for above in (path, *ancestors(path))}

    def is_block(path: str) -> bool:
        return path in mixing and _has_norm(tree, path) and any(not p.is_conv for p in tree.projections_in([path]))

    lists = {path: elements for path in tree.modules if (elements := _list_elements(tree, path))}
    lists = {path: elements for path, elements in lists.items() if all(map(is_block, elements))}
    innermost = [path for path in lists if not any(path in ancestors(other) for other in lists)]
    return [
        BlockCandidate(path, int(name) if (name := element.rpartition(".")[2]).isdigit() else i, (element,), True)
        for path in innermost
        for i, element in enumerate(lists[path])
    ]


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
    return tuple(child for name, _ in module.named_children() if (child := f"{path}.{name}") in tree.modules)


def _are_bare_attentions(tree: ModuleTree, children: tuple[str, ...]) -> bool:
    """Each element is an attention, not a block around one: all its projections are its own children."""

    def is_bare(child: str) -> bool:
        qkv = (tree.projections[path] for path in tree.qkv_named if tree.is_inside(path, child))
        return any(p.container == child for p in qkv) and all(
            p.container == child for p in tree.projections_in([child])
        )

    return all(map(is_bare, children))


def _is_hybrid(tree: ModuleTree, children: tuple[str, ...], attending: set[str]) -> bool:
    """Some elements attend, the others have at least a norm and a projection, as blocks do."""
    return any(child in attending for child in children) and all(
        child in attending or (_has_norm(tree, child) and bool(tree.projections_in([child]))) for child in children
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
    bare = {path for path, elements in stacks.items() if _are_bare_attentions(tree, elements)}
    parallel: dict[str, list[str]] = {path: [] for path in stacks}  # list of a block's first members -> the others
    for path in stacks:
        if path not in bare or path not in parallel:
            continue
        beside = [p for p in lists if p != path and parent(p) == parent(path) and len(lists[p]) == len(stacks[path])]
        if blocks := [p for p in beside if p in stacks and p not in bare]:
            parallel[blocks[0]].append(path)
            del parallel[path]
        else:
            parallel[path] = beside
            parallel = {p: others for p, others in parallel.items() if p not in beside}
    for path, beside in parallel.items():
        for i, element in enumerate(stacks[path]):
            name = element.rpartition(".")[2]
            yield BlockCandidate(
                tower=path,
                index=int(name) if name.isdigit() else i,
                members=(element, *(lists[p][i] for p in beside)),
                is_one_module=path not in bare or not beside,  # a block may hold all its projections itself
            )
