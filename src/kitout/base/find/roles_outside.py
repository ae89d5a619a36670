"""Roles outside the blocks: token tables, patch embeddings, output heads.

What a model declares itself (transformers' input and output embeddings) is taken first. What it does not declare is
recognized by kind, by width (does it write the width of a tower?) and, last, by a few words. It knows nothing of blocks
but their widths and paths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from kitout.base.find.module_tree import ModuleTree
from kitout.base.find.vocabulary import EMBEDS, HEAD, NOT_TOKENS, PATCH
from kitout.base.loaded_classes import pretrained_model


def label_outside_blocks(tree: ModuleTree, inside: Collection[str], widths: Collection[int]) -> dict[str, str]:
    """Path -> role of the leaves outside the blocks that have one. inside: the leaves of the blocks."""
    free = [path for path in tree.leaves if path not in inside]
    roles = dict.fromkeys(_find_token_tables(tree, free), "embed")
    roles |= dict.fromkeys(_find_patch_embeddings(tree, free, set(widths)), "patch")
    roles |= dict.fromkeys(_find_heads(tree, free, inside), "head")
    return roles


def _declared_embeddings(tree: ModuleTree, which: str) -> list[nn.Module]:
    """Input or output embeddings as each transformers model in the tree (a composite holds several) names them."""
    tables = []
    models: list[Any] = [module for module in tree.modules.values() if isinstance(module, pretrained_model())]
    for model in models:
        try:
            table = model.get_input_embeddings() if which == "in" else model.get_output_embeddings()
        except (NotImplementedError, AttributeError):  # a model without one; some raise on access
            continue
        if isinstance(table, nn.Module):
            tables.append(table)
    return tables


def _find_token_tables(tree: ModuleTree, free: Iterable[str]) -> list[str]:
    """Declared token tables and those shaped like them; where nothing is declared, the table with the most rows."""
    tables = {p: tree.modules[p] for p in free if tree.leaves[p].kind == "embedding"}
    if isinstance(tree.modules[""], pretrained_model()):
        declared = _declared_embeddings(tree, "in")
        shapes = {tree.leaves[p] for p, m in tables.items() if any(m is table for table in declared)}
    else:
        named = {p: tree.leaves[p] for p in tables if not NOT_TOKENS.search(p.rpartition(".")[2])}
        shapes = {max(named.values(), key=lambda leaf: leaf.d_in)} if named else set()
    return [p for p in tables if tree.leaves[p] in shapes]


def _find_patch_embeddings(tree: ModuleTree, free: Iterable[str], widths: set[int]) -> list[str]:
    """What writes the width of a tower and cuts an image: a convolution whose windows do not overlap (or that is
    called an embedding), or a linear called patch.
    """

    def cuts_image(path: str) -> bool:
        module, leaf = tree.modules[path], tree.leaves[path]
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            no_overlap = module.kernel_size == module.stride and leaf.d_in not in widths
            return max(module.stride) > 1 and (no_overlap or bool(EMBEDS.search(path)))
        return leaf.kind == "linear" and bool(PATCH.search(path))

    return [p for p in free if tree.leaves[p].d_out in widths and cuts_image(p)]


def _find_heads(tree: ModuleTree, free: Iterable[str], inside: Collection[str]) -> list[str]:
    """Declared output heads, and linears that are, or lie directly in, something called head after the last block."""
    declared = _declared_embeddings(tree, "out")
    order = {path: i for i, path in enumerate(tree.leaves)}
    last = max((order[p] for p in inside), default=-1)

    def is_called_head(path: str) -> bool:
        names = [name for name in path.split(".") if not name.isdigit()]
        if HEAD.fullmatch(names[-1]):
            return True
        in_attention_pooling = any(tree.is_inside(p, path.rpartition(".")[0]) for p in tree.qkv_named)
        return len(names) > 1 and bool(HEAD.fullmatch(names[-2])) and not in_attention_pooling

    return [
        p
        for p in free
        if any(tree.modules[p] is head for head in declared)
        or (tree.leaves[p].kind == "linear" and order[p] > last and is_called_head(p))
    ]
